"""The conjugate pairs: each forward and each gradient equals its definition (all values exact in float64)."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert_tp.parallel import collectives
from megatron_bert_tp.parallel.collectives import (
    copy_to,
    gather_from,
    gather_over,
    maximum_over_,
    own_part,
    reduce_from,
    scatter_to,
    start_sum_over_,
    sum_over_,
)
from megatron_bert_tp.parallel.mesh import Axis
from tests.support import Layout, build_mesh

SIZE = 4
OPERATORS = {
    "copy_to": copy_to,
    "reduce_from": reduce_from,
    "scatter_to": scatter_to,
    "gather_from": gather_from,
    "scatter_to_rows": lambda x, axis: scatter_to(x, axis, dim=0),
    "gather_from_rows": lambda x, axis: gather_from(x, axis, dim=0),
}
INPUT_SHAPES = {"scatter_to": (3, 8), "scatter_to_rows": (8, 3)}


def whole_numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, shape, generator=generator).double()


def input_of(name: str, rank: int) -> Tensor:
    # What is scattered is equal on all ranks.
    seed = 0 if name.startswith("scatter") else rank
    return whole_numbers(*INPUT_SHAPES.get(name, (3, 2)), seed=seed)


def run_operator(name: str, axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """Output, the gradient that comes in, and the gradient of the input."""
    x = input_of(name, axis.rank).requires_grad_()
    # A factor before and after: an operator that changes its input or its gradient in place shows.
    product = 1 * x
    output = OPERATORS[name](product, axis)
    assert torch.equal(product, x), "changed its input"
    grad = whole_numbers(*output.shape, seed=100 + axis.rank)
    given = grad.clone()
    output.backward(grad)
    assert torch.equal(grad, given), "changed the gradient that it was given"
    return output.detach(), grad, x.grad


def run_operators() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    axis = build_mesh(Layout(tensor=SIZE)).tensor
    return {name: run_operator(name, axis) for name in OPERATORS}


def results(ranks) -> dict[str, list[tuple[Tensor, Tensor, Tensor]]]:
    answers = ranks.run(SIZE, run_operators)
    return {name: [answer[name] for answer in answers] for name in OPERATORS}


def test_operators_and_their_gradients_equal_their_definitions(ranks):
    found = results(ranks)
    for name, dim in (("copy_to", 1), ("reduce_from", 1), ("scatter_to", 1), ("gather_from", 1),
                      ("scatter_to_rows", 0), ("gather_from_rows", 0)):  # fmt: skip
        inputs = [input_of(name, rank) for rank in range(SIZE)]
        grads = [grad for _, grad, _ in found[name]]
        for rank, (output, grad, grad_input) in enumerate(found[name]):
            forward, backward = {
                "copy_to": lambda i=inputs, r=rank, g=grads: (i[r], sum(g)),
                "reduce_from": lambda i=inputs, own=grad: (sum(i), own),
                "scatter_to": lambda i=inputs, r=rank, g=grads, d=dim: (i[0].chunk(SIZE, d)[r], torch.cat(g, d)),
                "gather_from": lambda i=inputs, r=rank, own=grad, d=dim: (torch.cat(i, d), own.chunk(SIZE, d)[r]),
            }[name.removesuffix("_rows")]()
            assert torch.equal(output, forward), (name, rank)
            assert torch.equal(grad_input, backward), (name, rank)


def run_plain() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    axis = build_mesh(Layout(tensor=SIZE)).tensor
    own = whole_numbers(3, 2, seed=axis.rank)
    started = own.clone()
    work = start_sum_over_(started, axis)
    work.wait()
    strided = own.t()
    return sum_over_(own.clone(), axis), started, maximum_over_(own.clone(), axis), gather_over(strided, axis, dim=1)


def test_sums_maxima_and_gathers_over_an_axis(ranks):
    inputs = [whole_numbers(3, 2, seed=rank) for rank in range(SIZE)]
    for summed, started, maximum, gathered in ranks.run(SIZE, run_plain):
        assert torch.equal(summed, sum(inputs))
        assert torch.equal(started, sum(inputs))
        assert torch.equal(maximum, torch.stack(inputs).amax(0))
        assert torch.equal(gathered, torch.cat([part.t() for part in inputs], 1))


def test_axis_of_one_rank_sends_nothing(monkeypatch):
    """Also without any process group: everything is the identity."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("a message on an axis of one rank")

    for name in ("all_reduce", "all_gather"):
        monkeypatch.setattr(dist, name, refuse)
    alone, x = Axis.alone("tensor"), whole_numbers(3, 2, seed=0)
    assert collectives.dist is dist
    for operator in OPERATORS.values():
        assert operator(x, alone) is x
    assert sum_over_(x, alone) is x
    assert maximum_over_(x, alone) is x
    assert start_sum_over_(x, alone) is None
    assert own_part(x, alone, dim=0) is x
    assert gather_over(x, alone, dim=0) is x
