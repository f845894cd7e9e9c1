"""The conjugate pairs: each forward and each gradient equals its definition (all values exact in float64)."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert_tp.parallel.collectives import (
    copy_to,
    finish,
    gather_from,
    gather_over,
    gather_rows_over,
    maximum_over_,
    own_part,
    reduce_from,
    reduce_scatter_over,
    scatter_sum_to,
    scatter_to,
    start_all_gather,
    start_reduce_scatter,
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
    "scatter_sum_to": scatter_sum_to,
    "scatter_to_rows": lambda x, axis: scatter_to(x, axis, dim=0),
    "gather_from_rows": lambda x, axis: gather_from(x, axis, dim=0),
}
INPUT_SHAPES = {"scatter_to": (3, 8), "scatter_to_rows": (8, 3), "scatter_sum_to": (8, 3)}


def whole_numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, shape, generator=generator).double()


def input_of(name: str, rank: int) -> Tensor:
    # What is scattered is equal on all ranks.
    seed = 0 if name.startswith("scatter_to") else rank
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
        case "scatter_sum_to":
            return sum(inputs).chunk(SIZE)[rank], torch.cat(grads)
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


def run_scatters() -> tuple[Tensor, ...]:
    axis = build_mesh(Layout(tensor=SIZE)).tensor
    own = whole_numbers(SIZE * 6, seed=axis.rank)
    share, whole = own.new_empty(6), own.new_empty(SIZE * 6)
    finish(start_reduce_scatter(share, own, axis), axis)
    finish(start_all_gather(whole, share, axis), axis)
    rows = own.view(SIZE * 2, 3)
    return share, whole, reduce_scatter_over(rows, axis), gather_rows_over(rows.t()[:2], axis)


def test_scattered_sums_and_gathered_shares(ranks):
    inputs = [whole_numbers(SIZE * 6, seed=rank) for rank in range(SIZE)]
    for rank, (share, whole, scattered, gathered) in enumerate(ranks.run(SIZE, run_scatters)):
        assert torch.equal(share, sum(inputs).chunk(SIZE)[rank])
        assert torch.equal(whole, sum(inputs))
        assert torch.equal(scattered, share.view(2, 3))
        assert torch.equal(gathered, torch.cat([each.view(SIZE * 2, 3).t()[:2] for each in inputs]))


def test_names_before_torch_2_13_are_found(monkeypatch):
    """Versions from 2.10 on have only the names that 2.13 calls deprecated."""
    called = []
    for new in ("reduce_scatter_single", "all_gather_single"):
        monkeypatch.delattr(dist, new, raising=False)
    for old in ("reduce_scatter_tensor", "all_gather_into_tensor"):
        monkeypatch.setattr(dist, old, lambda *_args, name=old, **_options: called.append(name))
    pair, flat = Axis("data", (0, 1), 0), whole_numbers(4, seed=0)
    start_reduce_scatter(flat[:2], flat, pair)
    start_all_gather(flat, flat[:2], pair)
    assert called == ["reduce_scatter_tensor", "all_gather_into_tensor"]


def test_axis_of_one_rank_sends_nothing(monkeypatch):
    """Also without any process group: everything is the identity."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("a message on an axis of one rank")

    for name in ("all_reduce", "all_gather", "all_gather_single", "reduce_scatter_single"):
        monkeypatch.setattr(dist, name, refuse, raising=False)
    alone, x = Axis.alone("tensor"), whole_numbers(3, 2, seed=0)
    for operator in OPERATORS.values():
        assert operator(x, alone) is x
    assert sum_over_(x, alone) is x
    assert maximum_over_(x, alone) is x
    assert start_sum_over_(x, alone) is None
    assert own_part(x, alone, dim=0) is x
    assert gather_over(x, alone, dim=0) is x
    assert gather_rows_over(x, alone) is x
    assert reduce_scatter_over(x, alone) is x
    for start in (start_all_gather, start_reduce_scatter):
        target = torch.empty_like(x)
        assert start(target, x, alone) is None
        assert torch.equal(target, x)
