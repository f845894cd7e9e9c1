"""The conjugate pairs: each forward and each gradient equals its definition (all values exact in float64)."""

import torch
import torch.distributed as dist
from torch import Tensor

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


def definition(name: str, rank: int, inputs: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input on one rank."""
    dim = 0 if name.endswith("_rows") else -1
    match name.removesuffix("_rows"):
        case "copy_to":
            return inputs[rank], sum(grads)
        case "reduce_from":
            return sum(inputs), grads[rank]
        case "scatter_to":
            return inputs[0].chunk(SIZE, dim)[rank], torch.cat(grads, dim)
        case _:
            return torch.cat(inputs, dim), grads[rank].chunk(SIZE, dim)[rank]


def test_operators_and_their_gradients_equal_their_definitions(ranks):
    answers = ranks.run(SIZE, run_operators)
    for name in OPERATORS:
        inputs = [input_of(name, rank) for rank in range(SIZE)]
        grads = [answer[name][1] for answer in answers]
        for rank, answer in enumerate(answers):
            output, grad_input = definition(name, rank, inputs, grads)
            assert torch.equal(answer[name][0], output), (name, rank)
            assert torch.equal(answer[name][2], grad_input), (name, rank)


def run_plain() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    axis = build_mesh(Layout(tensor=SIZE)).tensor
    own = whole_numbers(3, 2, seed=axis.rank)
    started = own.clone()
    work = start_sum_over_(started, axis)
    work.wait()
    maximum, gathered = maximum_over_(own.clone(), axis), gather_over(own.t(), axis, dim=1)
    return sum_over_(own.clone(), axis), started, maximum, gathered


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
    for operator in OPERATORS.values():
        assert operator(x, alone) is x
    assert sum_over_(x, alone) is x
    assert maximum_over_(x, alone) is x
    assert start_sum_over_(x, alone) is None
    assert own_part(x, alone, dim=0) is x
    assert gather_over(x, alone, dim=0) is x
