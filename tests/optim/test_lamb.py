"""LAMB against the paper's formulas on whole tensors in one process, float64, on real ranks."""

from dataclasses import dataclass
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert_tp.optim.rules import OptimizerNumbers, build_optimizer, moment_of, step_
from megatron_bert_tp.parallel.collectives import sum_over_
from megatron_bert_tp.parallel.mesh import Axis, MeshShape, ParallelMesh
from tests.comparison import Piece, join
from tests.optim.rectangles import (
    ALONE,
    LOOKUP,
    PROJECTION,
    WHOLES,
    Whole,
    assert_near,
    gradients_of,
    owned_of,
    pieces,
    walk,
    weights_at_start,
)

NUMBERS = OptimizerNumbers(name="lamb", beta1=0.8, beta2=0.95, epsilon=1e-6)
RATES, DECAYS = [0.1, 0.02, 0.05], [0.3, 0.1, 0.0]
# Sums of some hundred squares in another order: 1e-14 at most; three steps.
TOLERANCE = 1e-12
NOT_ADAPTED = {"a.dense.bias", "a.ln.weight", "query.bias"}


def lamb_of_the_paper(decays: list[float]) -> dict[str, Tensor]:
    """You et al. 2020, algorithm 2, with the identity for phi, tensor by tensor.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  r = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps);
    x = x - rate * |x| / |r + decay x| * (r + decay x).  Biases and LayerNorms: no decay, factor 1.
    """
    weights = weights_at_start()
    for name, x in weights.items():
        m, v = torch.zeros_like(x), torch.zeros_like(x)
        for t, (rate, decay) in enumerate(zip(RATES, decays, strict=True), start=1):
            g = gradients_of(t - 1)[name]
            m = 0.8 * m + 0.2 * g
            v = 0.95 * v + 0.05 * g * g
            r = (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6)
            if name in NOT_ADAPTED:
                x = x - rate * r
                continue
            r = r + decay * x
            has_norms = (x != 0).any() and (r != 0).any()
            x = x - rate * ((x * x).sum().sqrt() / (r * r).sum().sqrt() if has_norms else 1.0) * r
        weights[name] = x
    return weights


@dataclass(frozen=True)
class Split:
    """Tensor ranks x data ranks, and whether the data ranks own rows of their own or copies of all."""

    tensor: int = 1
    data: int = 1
    is_sharded: bool = True


SPLITS = [
    Split(tensor=2),
    Split(data=2),
    Split(data=4),
    Split(tensor=2, data=2),
    Split(tensor=2, data=2, is_sharded=False),
]


def steps_on_a_rank(split: Split, wholes: tuple[Whole, ...]) -> tuple[list[list[float]], list[Piece], list[Piece]]:
    """Sums that came back, weights and second moments of this rank after three steps."""
    shape = MeshShape(pipeline=1, data=split.data, tensor=split.tensor)
    mesh = ParallelMesh.build(shape, rank=dist.get_rank(), timeout=timedelta(seconds=60))
    owners = mesh.data if split.is_sharded else ALONE
    messages = []

    def sum_over_owners(vector: Tensor) -> Tensor:
        assert vector.dtype == torch.float64
        assert vector.dim() == 1
        summed = sum_over_(sum_over_(vector, mesh.tensor), owners)
        messages.append(summed.tolist())
        return summed

    owned = owned_of(wholes, axis=mesh.tensor, owners=owners)
    optimizer = build_optimizer(owned, NUMBERS, sum_over_owners=sum_over_owners)
    walk(owned, optimizer, RATES, decays=DECAYS)
    seconds = moment_of(optimizer, "exp_avg_sq")
    moments = [Piece(each.part.name, each.part.shape, each.part.offsets, seconds(each).clone()) for each in owned]
    return messages, pieces(owned), moments


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_split_tensors_move_as_the_paper_moves_whole_ones(ranks, split):
    answers = ranks.run(split.tensor * split.data, steps_on_a_rank, split, WHOLES)
    assert [len(messages) for messages, _, _ in answers] == [len(RATES)] * len(answers)
    # Every element once: a tensor that each rank counted would still have the right quotient of norms.
    adapted = [weight for name, weight in weights_at_start().items() if name not in NOT_ADAPTED]
    squares = [weight.square().sum().item() for weight in adapted]
    for messages, _, _ in answers:
        assert messages[0][: len(squares)] == pytest.approx(squares, rel=1e-14)
    assert_near(join(piece for _, found, _ in answers for piece in found), lamb_of_the_paper(DECAYS), TOLERANCE)
    second = join(piece for _, _, found in answers for piece in found)[LOOKUP]
    powers = [gradients_of(step)[LOOKUP] ** 2 for step in range(3)]
    truth = 0.05 * sum(power * 0.95**age for age, power in enumerate(reversed(powers)))
    torch.testing.assert_close(second, truth, rtol=TOLERANCE, atol=0)


def alone(wholes=WHOLES, dtype=torch.float64, *, owners=ALONE) -> dict[str, Tensor]:
    owned = owned_of(wholes, dtype=dtype, owners=owners)
    optimizer = build_optimizer(owned, NUMBERS, sum_over_owners=lambda vector: vector)
    walk(owned, optimizer, RATES, decays=DECAYS)
    return join(pieces(owned))


def test_one_process_moves_as_the_paper_does():
    assert_near(alone(), lamb_of_the_paper(DECAYS), TOLERANCE)


def test_float32_weights_follow_float64_up_to_their_rounding():
    # Three steps on numbers below 20, 6e-8 each, and a root of second moments that are near 1.
    found = {name: weight.double() for name, weight in alone(dtype=torch.float32).items()}
    assert_near(found, lamb_of_the_paper(DECAYS), 2e-6)


def test_a_tied_copy_on_another_stage_moves_as_the_original():
    found = alone()
    assert torch.equal(found[LOOKUP], found[PROJECTION])
    tied = tuple(whole for whole in WHOLES if whole.name == PROJECTION)
    assert torch.equal(alone(tied)[PROJECTION], found[LOOKUP])


def test_a_step_is_as_long_as_the_weight_whatever_the_gradient():
    """The point of LAMB: norm(step) = rate x norm(weight); ten times the gradient changes nothing."""
    (owned,) = owned_of([Whole("query.weight", (8, 5))])
    before = owned.weight.clone()
    optimizer = build_optimizer([owned], NUMBERS, sum_over_owners=lambda vector: vector)
    walk([owned], optimizer, [0.25], decays=[0.7])
    length = (owned.weight - before).norm() / before.norm()
    assert length.item() == pytest.approx(0.25, rel=1e-14)


def test_a_rank_without_rows_gives_zeros_and_takes_part():
    sent = []
    owned = owned_of(WHOLES, owners=Axis("owners", tuple(range(30)), 29))
    assert not any(each.weight.numel() for each in owned)

    def record(vector: Tensor) -> Tensor:
        sent.append(vector.clone())
        return vector

    walk(owned, build_optimizer(owned, NUMBERS, sum_over_owners=record), RATES, decays=DECAYS)
    assert [vector.tolist() for vector in sent] == [[0.0] * 2 * (len(WHOLES) - len(NOT_ADAPTED))] * len(RATES)


def test_a_weight_without_gradient_and_decay_stays():
    """Its update has norm 0; so has its weight in the other: neither may be divided by."""
    for name in ("query.weight", "zero.weight"):
        (owned,) = owned_of([whole for whole in WHOLES if whole.name == name])
        before = owned.weight.clone()
        step_(build_optimizer([owned], NUMBERS, sum_over_owners=lambda v: v), rate=0.5, weight_decay=0.0)
        assert torch.equal(owned.weight, before)
