"""The products of the parallel linear layers and their backwards (Shoeybi et al. 2019, section 3).

Each has a twin for hidden states whose tokens are split over the axis too (Korthikanti et al. 2022, section
4.2.2): between the layers a rank has ``[1, tokens / size, features]``, in the products all tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_bert_tp.parallel.collectives import (
    finish,
    gather_rows_over,
    reduce_scatter_over,
    start_gather_rows,
    start_reduce_scatter,
    start_sum_over_,
    sum_over_,
)
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.weight_gradients import Gradients, WeightGradients

InputGradients = tuple[Tensor | None, ...]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _remember(
    ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, weights: WeightGradients | None
) -> None:
    ctx.save_for_backward(x, weight)
    # The parameters themselves: where activations are recomputed, what was saved comes back as another tensor.
    ctx.leaves = weight, bias
    ctx.axis, ctx.weights = axis, weights or WeightGradients()


def _of_leaves(ctx: Any, compute: Callable[[], Gradients]) -> Gradients:
    """Gradients of weight and bias as far as they are needed now."""
    needed = zip(ctx.leaves, ctx.needs_input_grad[1:3], strict=True)
    gradients: Gradients = ctx.weights.of([leaf if is_needed else None for leaf, is_needed in needed], compute)
    return gradients


def _of_linear(x: Tensor, grad: Tensor, dtype: torch.dtype, has_bias: bool) -> Gradients:
    """Gradients of weight and bias from all rows of the input and of the output's gradient."""
    # Under autocast the product, and so its gradient, has another number format than what went in.
    grad_weight = grad.t().matmul(_flat(x).to(grad.dtype)).to(dtype)
    return grad_weight, grad.sum(0).to(dtype) if has_bias else None


class ColumnProduct(torch.autograd.Function):
    """``x W^T + b`` whose backward adds the input gradient over the axis while it multiplies the weights'."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, weights: WeightGradients | None
    ) -> Tensor:
        """``[..., in]`` to ``[..., out / size]``."""
        _remember(ctx, x, weight, bias, axis, weights)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> InputGradients:
        """One all-reduce of the input's shape."""
        x, weight = ctx.saved_tensors
        grad = _flat(grads[0])
        grad_x = grad.matmul(weight.to(grad.dtype)).view(x.shape)
        summing = start_sum_over_(grad_x, ctx.axis)
        has_bias = ctx.leaves[1] is not None
        of_leaves = _of_leaves(ctx, partial(_of_linear, x.detach(), grad.detach(), weight.dtype, has_bias))
        finish(summing, ctx.axis)
        return grad_x.to(x.dtype), *of_leaves, None, None


class RowProduct(torch.autograd.Function):
    """``sum_r x_r W_r^T + b``: the all-reduce is in the forward, the backward needs no message.

    ``bias`` is None where a kernel adds it later.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, weights: WeightGradients | None
    ) -> Tensor:
        """``[..., in / size]`` to ``[..., out]``."""
        _remember(ctx, x, weight, bias, axis, weights)
        if axis.size == 1:
            return F.linear(x, weight, bias)
        # Bias after the all-reduce: inside it, every rank would add it once.
        return _add_bias_(sum_over_(F.linear(x, weight), axis), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> InputGradients:
        """Of this rank's features."""
        x, weight = ctx.saved_tensors
        grad = _flat(grads[0])
        grad_x = grad.matmul(weight.to(grad.dtype)).view(x.shape).to(x.dtype)
        has_bias = ctx.leaves[1] is not None
        of_leaves = _of_leaves(ctx, partial(_of_linear, x.detach(), grad.detach(), weight.dtype, has_bias))
        return grad_x, *of_leaves, None, None


def _add_bias_(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product.add_(bias.to(product.dtype))


class GatheredColumnProduct(torch.autograd.Function):
    """`ColumnProduct` of the tokens of all ranks: gathered in the forward, and once more for the weights.

    So a rank keeps its own tokens alone.  In the backward the gathering goes on beside the product of the input
    gradient, and the scattering of its sum beside that of the weights.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, weights: WeightGradients | None
    ) -> Tensor:
        """``[1, tokens / size, in]`` to ``[1, tokens, out / size]``: one all-gather."""
        _remember(ctx, x, weight, bias, axis, weights)
        return F.linear(gather_rows_over(x[0], axis), weight, bias)[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> InputGradients:
        """One all-gather, which is part of what can be put off, and one reduce-scatter."""
        x, weight = ctx.saved_tensors
        grad = _flat(grads[0])
        gathering = partial(start_gather_rows, _flat(x.detach()).to(grad.dtype), ctx.axis)
        started = None if ctx.weights.is_put_off or not any(ctx.needs_input_grad[1:3]) else gathering()
        whole = grad.matmul(weight.to(grad.dtype))
        grad_x = torch.empty_like(x, dtype=grad.dtype, memory_format=torch.contiguous_format)
        scattering = start_reduce_scatter(grad_x, whole, ctx.axis)
        has_bias = ctx.leaves[1] is not None
        compute = partial(_of_gathered, started or gathering, grad.detach(), weight.dtype, has_bias, axis=ctx.axis)
        of_leaves = _of_leaves(ctx, compute)
        finish(scattering, ctx.axis)
        return grad_x.to(x.dtype), *of_leaves, None, None


Gathering = tuple[Tensor, dist.Work | None]


def _of_gathered(
    x: Gathering | Callable[[], Gathering], grad: Tensor, dtype: torch.dtype, has_bias: bool, *, axis: Axis
) -> Gradients:
    """Like `_of_linear` with an input that is on its way, or has to be sent for."""
    whole, work = x() if callable(x) else x
    finish(work, axis)
    return _of_linear(whole, grad, dtype, has_bias)


class ScatteredRowProduct(torch.autograd.Function):
    """`RowProduct` of which each rank gets its own tokens: a reduce-scatter in the place of the all-reduce."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, weights: WeightGradients | None
    ) -> Tensor:
        """``[1, tokens, in / size]`` to ``[1, tokens / size, out]``."""
        _remember(ctx, x, weight, bias, axis, weights)
        return _add_bias_(reduce_scatter_over(F.linear(x[0], weight), axis), bias)[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> InputGradients:
        """One all-gather; the bias' gradient is that of this rank's own tokens."""
        x, weight = ctx.saved_tensors
        own = _flat(grads[0])
        grad = gather_rows_over(own, ctx.axis)
        grad_x = grad.matmul(weight.to(grad.dtype)).view(x.shape).to(x.dtype)
        of_bias = None if ctx.leaves[1] is None else own.detach()
        compute = partial(_of_scattered, x.detach(), grad.detach(), of_bias, weight.dtype)
        return grad_x, *_of_leaves(ctx, compute), None, None


def _of_scattered(x: Tensor, grad: Tensor, of_bias: Tensor | None, dtype: torch.dtype) -> Gradients:
    grad_weight, _ = _of_linear(x, grad, dtype, False)
    return grad_weight, None if of_bias is None else of_bias.sum(0).to(dtype)
