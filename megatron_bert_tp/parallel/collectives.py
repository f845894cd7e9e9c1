"""Messages between the ranks of one axis, plain and as differentiable functions.

The pairs of the Megatron-LM paper (Shoeybi et al. 2019, section 3): ``copy_to`` is *f* (identity forward,
all-reduce backward) and ``reduce_from`` is *g* (all-reduce forward, identity backward).  ``scatter_to`` and
``gather_from`` split and join features.  ``scatter_sum_to`` is what sequence parallelism puts in the place of
*g* (Korthikanti et al. 2022, section 4.2.2).  On an axis of one rank all of them are the identity.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert_tp.parallel.mesh import Axis


def sum_over_(tensor: Tensor, axis: Axis) -> Tensor:
    """Add the tensors of all ranks of ``axis`` in place, bit-equal on all of them."""
    if axis.size > 1:
        with axis.waits:
            dist.all_reduce(tensor, group=axis.group)
    return tensor


def start_sum_over_(tensor: Tensor, axis: Axis) -> dist.Work | None:
    """Like `sum_over_`, but returns at once; wait on the handle before reading ``tensor``."""
    if axis.size == 1:
        return None
    work: dist.Work = dist.all_reduce(tensor, group=axis.group, async_op=True)
    return work


def maximum_over_(tensor: Tensor, axis: Axis) -> Tensor:
    """Elementwise maximum over the ranks of ``axis``, in place."""
    if axis.size > 1:
        with axis.waits:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=axis.group)
    return tensor


def gather_over(tensor: Tensor, axis: Axis, *, dim: int) -> Tensor:
    """Join the tensors of all ranks of ``axis`` along ``dim``, in the order of their place."""
    if axis.size == 1:
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in axis.ranks]
    own = tensor.contiguous()
    with axis.waits:
        dist.all_gather(parts, own, group=axis.group)
    return torch.cat(parts, dim)


def own_part(tensor: Tensor, axis: Axis, *, dim: int) -> Tensor:
    """This rank's equal share of ``tensor`` along ``dim`` (a copy); the size must divide."""
    return tensor.chunk(axis.size, dim)[axis.rank].contiguous() if axis.size > 1 else tensor


def start_reduce_scatter(share: Tensor, whole: Tensor, axis: Axis) -> dist.Work | None:
    """Fill ``share`` with this rank's run of the sum of all ranks' ``whole``; wait on the handle before reading.

    Both are contiguous, ``whole`` with the elements of ``axis.size`` shares in the order of ranks.  On an axis
    of one rank ``whole`` is copied.
    """
    if axis.size == 1:
        share.copy_(whole.view_as(share))
        return None
    work: dist.Work = _named("reduce_scatter_single", "reduce_scatter_tensor")(
        share.view(-1), whole.view(-1), group=axis.group, async_op=True
    )
    return work


def start_all_gather(whole: Tensor, share: Tensor, axis: Axis) -> dist.Work | None:
    """Fill ``whole`` with the shares of all ranks in their order; wait on the handle before reading.

    Both are contiguous.  On an axis of one rank ``share`` is copied.
    """
    if axis.size == 1:
        whole.copy_(share.view_as(whole))
        return None
    work: dist.Work = _named("all_gather_single", "all_gather_into_tensor")(
        whole.view(-1), share.view(-1), group=axis.group, async_op=True
    )
    return work


def _named(name: str, former: str) -> Any:
    """The function ``name`` of `torch.distributed`, which is called ``former`` before torch 2.13."""
    return getattr(dist, name, None) or getattr(dist, former)


def finish(work: dist.Work | None, axis: Axis) -> None:
    """Wait for what was started over ``axis``; there is nothing to wait for on an axis of one rank."""
    if work is not None:
        with axis.waits:
            work.wait()


def reduce_scatter_over(whole: Tensor, axis: Axis) -> Tensor:
    """This rank's equal share along dim 0 of the sum over all ranks of ``axis``."""
    if axis.size == 1:
        return whole
    share = whole.new_empty(whole.shape[0] // axis.size, *whole.shape[1:])
    finish(start_reduce_scatter(share, whole.contiguous(), axis), axis)
    return share


def gather_rows_over(share: Tensor, axis: Axis) -> Tensor:
    """The shares of all ranks of ``axis`` one behind another along dim 0, in one message without copies."""
    if axis.size == 1:
        return share
    whole, work = start_gather_rows(share, axis)
    finish(work, axis)
    return whole


def start_gather_rows(share: Tensor, axis: Axis) -> tuple[Tensor, dist.Work | None]:
    """Like `gather_rows_over`, but returns at once; `finish` the handle before reading."""
    whole = share.new_empty(axis.size * share.shape[0], *share.shape[1:])
    return whole, start_all_gather(whole, share.contiguous(), axis)


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum_over_(grads[0].clone(), ctx.axis), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        return sum_over_(tensor.clone(), axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _ScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return own_part(tensor, axis, dim=dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return gather_over(grads[0], ctx.axis, dim=ctx.dim), None, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return gather_over(tensor, axis, dim=dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return own_part(grads[0], ctx.axis, dim=ctx.dim), None, None


class _ScatterSumTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter_over(tensor, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather_rows_over(grads[0], ctx.axis), None


def copy_to(tensor: Tensor, axis: Axis) -> Tensor:
    """Operator *f*: the same values forward; backward adds the gradients of all ranks."""
    return _CopyTo.apply(tensor, axis) if axis.size > 1 else tensor


def reduce_from(tensor: Tensor, axis: Axis) -> Tensor:
    """Operator *g*: the sum of all ranks forward; backward passes the gradient through."""
    return _ReduceFrom.apply(tensor, axis) if axis.size > 1 else tensor


def scatter_to(tensor: Tensor, axis: Axis, *, dim: int = -1) -> Tensor:
    """Keep this rank's share along ``dim``; backward joins the shares of all ranks."""
    return _ScatterTo.apply(tensor, axis, dim) if axis.size > 1 else tensor


def gather_from(tensor: Tensor, axis: Axis, *, dim: int = -1) -> Tensor:
    """Join the shares of all ranks along ``dim``; backward keeps this rank's share."""
    return _GatherFrom.apply(tensor, axis, dim) if axis.size > 1 else tensor


def scatter_sum_to(tensor: Tensor, axis: Axis) -> Tensor:
    """This rank's share along dim 0 of the sum of all ranks; backward joins the gradients of all shares."""
    return _ScatterSumTo.apply(tensor, axis) if axis.size > 1 else tensor
