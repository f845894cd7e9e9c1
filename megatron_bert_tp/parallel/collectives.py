"""Messages between the ranks of one axis, plain and as differentiable functions.

The pairs of the Megatron-LM paper (Shoeybi et al. 2019, section 3): ``copy_to`` is *f* (identity forward,
all-reduce backward) and ``reduce_from`` is *g* (all-reduce forward, identity backward).  ``scatter_to`` and
``gather_from`` split and join features.  On an axis of one rank all of them are the identity.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert_tp.parallel.mesh import Axis


def sum_over_(tensor: Tensor, axis: Axis) -> Tensor:
    """Add the tensors of all ranks of ``axis`` in place, bit-equal on all of them."""
    if axis.size > 1:
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
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=axis.group)
    return tensor


def gather_over(tensor: Tensor, axis: Axis, *, dim: int) -> Tensor:
    """Join the tensors of all ranks of ``axis`` along ``dim``, in the order of their place."""
    if axis.size == 1:
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in axis.ranks]
    dist.all_gather(parts, tensor.contiguous(), group=axis.group)
    return torch.cat(parts, dim)


def own_part(tensor: Tensor, axis: Axis, *, dim: int) -> Tensor:
    """This rank's equal share of ``tensor`` along ``dim`` (a copy); the size must divide."""
    return tensor.chunk(axis.size, dim)[axis.rank].contiguous() if axis.size > 1 else tensor


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
