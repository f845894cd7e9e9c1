"""Sum, tie, norm and clip on real layouts against whole tensors in one process, float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megatron_bert_tp.model.shape import tensor_shapes
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.parallel.buckets import Bucket, in_buckets, slots_of
from megatron_bert_tp.parallel.gradients import Gradients
from megatron_bert_tp.parallel.mesh import Axis, ParallelMesh
from megatron_bert_tp.parallel.sharding import Part, parts
from tests.comparison import Piece, join, own_piece
from tests.support import CPU, ODD_SHAPE, Layout, Recipe, build_gradients, build_mesh, build_stage

TIED = Recipe(shape=ODD_SHAPE)
UNTIED = Recipe(shape=replace(ODD_SHAPE, tie_word_embeddings=False))
LAYOUTS = [
    Layout(),
    Layout(tensor=4),
    Layout(pipeline=2),
    Layout(pipeline=4, data=2),
    Layout(data=2, pipeline=2, tensor=2),
    Layout(data=2, shards=True),
    Layout(data=4, tensor=2, shards=True),
    Layout(data=2, pipeline=2, tensor=2, shards=True),
]
LOOKUP, PROJECTION = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
# The norm is about 200 here, and torch divides by (norm + 1e-6): 5e-9 apart.
CLIP_TOLERANCE = 1e-8


def name_of(layout: Layout) -> str:
    shards = "-shards" if layout.shards else ""
    return f"data{layout.data}-pipeline{layout.pipeline}-tensor{layout.tensor}{shards}"


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


def deliver(stage: MegatronBertStage, gradients: Gradients, replica: int) -> None:
    """Give every parameter its contribution in portions, as three microbatches would; they add up exactly."""
    gradients.begin(3)
    for portion in (0.25, 0.25, 0.5):
        whole: dict[int, tuple[nn.Parameter, Tensor]] = {}
        for part in reversed(stage.parts()):
            _, gradient = whole.setdefault(
                id(part.parameter), (part.parameter, torch.full_like(part.parameter, torch.nan))
            )
            part.view(gradient).copy_(portion * part.cut(contribution(part.name, part.shape, replica)))
        for parameter, gradient in whole.values():
            gradients.accumulate(parameter, gradient)


def reduce_and_clip(recipe: Recipe, layout: Layout, limit: float) -> tuple[float, list[Piece]]:
    """Norm before, and gradients after clipping, of this rank."""
    mesh = build_mesh(layout)
    stage = build_stage(recipe, mesh)
    names = list(tensor_shapes(recipe.shape))
    gradients = build_gradients(stage, mesh, names, bucket_bytes=4096, shards=layout.shards)
    deliver(stage, gradients, mesh.data.rank)
    norm = gradients.reduce_and_norm()
    gradients.clip_(norm, limit)
    return norm, [own_piece(part, gradient) for part, gradient in gradients.own]


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
    gradients.begin(1)
    for parameter in stage.parameters():
        gradients.accumulate(parameter, torch.full_like(parameter, 3))
    gradients.reduce_and_norm()
    first = gradients.squares()
    # Both uses of the tied embeddings come together in one gradient.
    assert all((g == (6 if part.name == LOOKUP else 3)).all() for part, g in gradients.own)
    assert torch.equal(gradients.squares(), first)


def test_a_parameter_without_a_gradient_has_zeros_and_not_the_last_steps():
    mesh = ParallelMesh.alone()
    stage = build_stage(UNTIED, mesh)
    gradients = build_gradients(stage, mesh, list(tensor_shapes(UNTIED.shape)))
    deliver(stage, gradients, 0)
    assert gradients.reduce_and_norm() > 0
    gradients.begin(2)
    assert gradients.reduce_and_norm() == 0


def test_gradients_are_divided_by_the_loss_scale_before_the_norm():
    mesh = ParallelMesh.alone()
    stage = build_stage(UNTIED, mesh)
    gradients = build_gradients(stage, mesh, list(tensor_shapes(UNTIED.shape)))
    deliver(stage, gradients, 0)
    norm = gradients.reduce_and_norm()
    deliver(stage, gradients, 0)
    assert gradients.reduce_and_norm(scale=1024.0) == norm / 1024  # a power of two: exact


class Rows(nn.Module):
    """Parameters of given shapes."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(torch.zeros(shape, dtype=torch.float64) for shape in shapes)


def parts_of(*shapes: tuple[int, ...]) -> list[Part]:
    return parts(Rows(*shapes), Axis.alone("tensor"))


def test_buckets_are_consecutive_and_of_about_the_size():
    sizes = [10, 1, 300, 2, 3, 50, 49, 1]
    given = parts_of(*((size,) for size in sizes))
    found = list(in_buckets(given, 400, 4))
    assert [part.name for bucket in found for part in bucket] == [part.name for part in given]
    totals = [[4 * part.local_shape[0] for part in bucket] for bucket in found]
    assert all(sum(bucket) >= 400 > sum(bucket[:-1]) for bucket in totals[:-1])
    assert list(in_buckets([], 400, 4)) == []


@pytest.mark.parametrize("num_owners", [1, 2, 3, 8])
def test_a_bucket_holds_the_rows_owner_by_owner_and_zeros_behind(num_owners):
    """Written out by hand: ceil(rows / owners) rows each, the last owners fewer, all runs of one length."""
    given = parts_of((5, 3), (2,), (8, 1, 2))
    bucket = Bucket(given, num_owners=num_owners, dtype=torch.float64, device=CPU)
    bucket.begin()
    values = [torch.arange(1.0, 1 + math.prod(p.shape), dtype=torch.float64).view(p.shape) for p in given]
    for slot, value in zip(bucket.slots, values, strict=True):
        bucket.add(slot, value)
        bucket.add(slot, value)
    for owner in range(num_owners):
        expected = []
        for value in values:
            share = -(-len(value) // num_owners)
            rows = 2 * value[owner * share : (owner + 1) * share].flatten()
            expected += [*rows.tolist(), *[0.0] * (share * value[0].numel() - len(rows))]
        assert bucket.flat[owner].tolist() == expected
        for slot, value in zip(bucket.slots, values, strict=True):
            owned = slot.part.owned_by(owner, num_owners)
            first = owned.offsets[0]
            rows = value[first : first + owned.local_shape[0]]
            assert torch.equal(slot.own(bucket.flat[owner], owned), 2 * rows)
    assert sum(slot.share for slot in slots_of(given, num_owners)) == bucket.flat.shape[1]


def launches(layout: Layout) -> list[tuple[int, int]]:
    """Buckets that had set out after each part of the last microbatch, and all buckets but the tied one."""
    mesh = build_mesh(layout)
    stage = build_stage(TIED, mesh)
    gradients = build_gradients(stage, mesh, list(tensor_shapes(TIED.shape)), shards=layout.shards)
    started = []
    launch = Gradients._launch
    seen = []

    def counted(self: Gradients, bucket: Bucket) -> None:
        started.append(bucket)
        launch(self, bucket)

    Gradients._launch = counted
    try:
        gradients.begin(2)
        parameters = list({id(part.parameter): part.parameter for part in reversed(stage.parts())}.values())
        for parameter in parameters:
            gradients.accumulate(parameter, torch.ones_like(parameter))
        assert started == []
        for parameter in parameters:
            gradients.accumulate(parameter, torch.ones_like(parameter))
            seen.append((len(started), len(gradients.buckets) - 1))
        gradients.reduce_and_norm()
        assert started == gradients.buckets
    finally:
        Gradients._launch = launch
    return seen


@pytest.mark.parametrize("shards", [False, True])
def test_buckets_set_out_while_the_last_backward_runs(ranks, shards):
    first, second = ranks.run(2, launches, Layout(data=2, shards=shards))
    assert first == second
    counts = [started for started, _ in first]
    assert counts == sorted(counts)
    assert len(set(counts)) > 5
    assert first[-1][0] == first[-1][1], "all but the tied bucket, which waits for both of its gradients"
