"""Sum, tie, norm and clip on real layouts against whole tensors in one process, float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megatron_bert_tp.model.shape import tensor_shapes
from megatron_bert_tp.parallel.gradients import TiedWeight, buckets, sum_over_data_, sum_tied_
from megatron_bert_tp.parallel.mesh import Axis, ParallelMesh
from tests.comparison import Piece, gradient_pieces, join
from tests.support import ODD_SHAPE, Layout, Recipe, build_gradients, build_mesh, build_stage

TIED = Recipe(shape=ODD_SHAPE)
UNTIED = Recipe(shape=replace(ODD_SHAPE, tie_word_embeddings=False))
LAYOUTS = [
    Layout(),
    Layout(tensor=4),
    Layout(pipeline=2),
    Layout(pipeline=4, data=2),
    Layout(data=2, pipeline=2, tensor=2),
]
LOOKUP, PROJECTION = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
# The norm is about 200 here, and torch divides by (norm + 1e-6): 5e-9 apart.
CLIP_TOLERANCE = 1e-8


def name_of(layout: Layout) -> str:
    return f"data{layout.data}-pipeline{layout.pipeline}-tensor{layout.tensor}"


def contribution(name: str, shape: tuple[int, ...], replica: int) -> Tensor:
    """Whole gradient of one tensor by one data rank: random, and of another size for every name."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * replica)
    return (1 + len(name) % 5) * torch.randn(shape, dtype=torch.float64, generator=generator)


def whole_gradients(recipe: Recipe, num_replicas: int) -> dict[str, Tensor]:
    """The truth: sums over replicas, and of both uses of the tied embeddings."""
    shapes = tensor_shapes(recipe.shape)
    sums = {n: sum(contribution(n, s, r) for r in range(num_replicas)) for n, s in shapes.items()}
    if recipe.shape.tie_word_embeddings:
        sums[LOOKUP] += sum(contribution(PROJECTION, shapes[LOOKUP], r) for r in range(num_replicas))
    return sums


def reduce_and_clip(recipe: Recipe, layout: Layout, limit: float) -> tuple[float, list[Piece]]:
    """Norm before, and gradients after clipping, of this rank."""
    mesh = build_mesh(layout)
    stage = build_stage(recipe, mesh)
    gradients = build_gradients(stage, mesh, list(tensor_shapes(recipe.shape)), bucket_bytes=4096)
    for part in stage.parts():
        if part.parameter.grad is None:
            part.parameter.grad = torch.zeros_like(part.parameter)
        part.view(part.parameter.grad).copy_(part.cut(contribution(part.name, part.shape, mesh.data.rank)))
    norm = gradients.reduce_and_norm()
    gradients.clip_(norm, limit)
    return norm, gradient_pieces(stage.parts())


def norm_of(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))


@pytest.mark.parametrize("recipe", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_norm_counts_every_parameter_once_and_clip_equals_torch(ranks, layout, recipe):
    truth = whole_gradients(recipe, layout.data)
    answers = ranks.run(layout.world, reduce_and_clip, recipe, layout, 1.5)
    assert {norm for norm, _ in answers} == {answers[0][0]}
    # A double sum of 1e5 squares: well below 1e-12.
    assert answers[0][0] == pytest.approx(norm_of(truth), rel=1e-12)
    parameters = {name: nn.Parameter(torch.zeros_like(gradient)) for name, gradient in truth.items()}
    for name, parameter in parameters.items():
        parameter.grad = truth[name].clone()
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.5)
    found = join(piece for _, pieces in answers for piece in pieces)
    assert found.keys() == truth.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, parameters[name].grad, rtol=CLIP_TOLERANCE, atol=0)


@pytest.mark.parametrize("limit", [0.0, 1e6], ids=["no limit", "limit above the norm"])
def test_gradients_within_the_limit_stay_as_they_are(ranks, limit):
    layout = Layout(pipeline=2, tensor=2)
    answers = ranks.run(layout.world, reduce_and_clip, UNTIED, layout, limit)
    found = join(piece for _, pieces in answers for piece in pieces)
    for name, gradient in whole_gradients(UNTIED, 1).items():
        assert torch.equal(found[name], gradient), name


def test_norm_leaves_the_gradients_alone():
    """In float64 a conversion to float64 copies nothing, so squaring in place would show here."""
    mesh = ParallelMesh.alone()
    stage = build_stage(TIED, mesh)
    gradients = build_gradients(stage, mesh, list(tensor_shapes(TIED.shape)))
    for part in stage.parts():
        part.parameter.grad = torch.full_like(part.parameter, 3)
    first = gradients.squares()
    assert all((part.parameter.grad == 3).all() for part in stage.parts())
    assert torch.equal(gradients.squares(), first)


def test_buckets_are_consecutive_and_of_about_the_size():
    sizes = [10, 1, 300, 2, 3, 50, 49, 1]
    gradients = [torch.zeros(size) for size in sizes]
    found = list(buckets(gradients, 400))
    assert [id(g) for bucket in found for g in bucket] == [id(g) for g in gradients]
    totals = [[4 * g.numel() for g in bucket] for bucket in found]
    assert all(sum(bucket) >= 400 > sum(bucket[:-1]) for bucket in totals[:-1])
    assert list(buckets([], 400)) == []


def sums_with_buckets(bucket_bytes: int) -> list[Tensor]:
    axis = build_mesh(Layout(data=2)).data
    shapes = [(3, 5), (7,), (1,), (4, 2, 2)]
    gradients = [contribution(str(number), shape, axis.rank) for number, shape in enumerate(shapes)]
    gradients[0] = gradients[0].t().contiguous().t()
    sum_over_data_(gradients, axis, bucket_bytes=bucket_bytes)
    return gradients


@pytest.mark.parametrize("bucket_bytes", [1, 100, 10**6])
def test_size_of_buckets_does_not_change_the_sums(ranks, bucket_bytes):
    for found in ranks.run(2, sums_with_buckets, bucket_bytes):
        for number, gradient in enumerate(found):
            parts = [contribution(str(number), tuple(gradient.shape), replica) for replica in range(2)]
            assert torch.equal(gradient, parts[0] + parts[1])


def test_tied_weight_without_a_backward_is_an_error():
    lookup, projection = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    lookup.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="without a gradient"):
        sum_tied_(TiedWeight(lookup, projection), Axis.alone("tied"))
