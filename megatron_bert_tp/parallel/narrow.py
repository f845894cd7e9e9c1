"""Numbers of 16 bits on CPU, where torch sums some gradients in 16 bits too: here they are sums in float32.

On CUDA torch's own kernels do so.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def is_narrow(tensor: Tensor) -> bool:
    """Whether the number format has 16 bits."""
    return tensor.dtype in (torch.float16, torch.bfloat16)


def is_narrow_on_cpu(tensor: Tensor) -> bool:
    """Whether torch would sum gradients in 16 bits."""
    return is_narrow(tensor) and tensor.device.type == "cpu"


class _NarrowLookup(torch.autograd.Function):
    """Rows of a weight; torch's own gradient of a token type stops growing after some hundred tokens."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_rows, ctx.padding_idx = weight.shape[0], padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        grad = grads[0].flatten(0, -2).float()
        summed = grad.new_zeros(ctx.num_rows, grad.shape[1]).index_add_(0, ids.flatten(), grad)
        if ctx.padding_idx is not None:
            summed[ctx.padding_idx] = 0
        return None, summed.to(grads[0].dtype), None


def look_up(ids: Tensor, weight: Tensor, *, padding_idx: int | None = None) -> Tensor:
    """``[...]`` ids to rows of ``weight`` ``[..., features]``; the row ``padding_idx`` gets no gradient."""
    if not is_narrow_on_cpu(weight):
        return F.embedding(ids, weight, padding_idx=padding_idx)
    rows: Tensor = _NarrowLookup.apply(ids, weight, padding_idx)
    return rows


class _NarrowNorm(torch.autograd.Function):
    """LayerNorm; torch's own gradients of weight and bias are off by some percent after some thousand tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        normed, mean, deviation = torch.native_layer_norm(
            x.float(), weight.shape, weight.float(), bias.float(), eps
        )
        ctx.save_for_backward(x, weight, bias, mean, deviation)
        return normed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias, mean, deviation = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grads[0].float().contiguous(),
            x.float(),
            weight.shape,
            mean,
            deviation,
            weight.float(),
            bias.float(),
            [True, True, True],
        )
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dim of ``[..., features]``, statistics in float32 or wider."""
    if not is_narrow_on_cpu(weight):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    normed: Tensor = _NarrowNorm.apply(x, weight, bias, eps)
    return normed
