"""Dropout of hidden states on a GPU: one kernel for bias, dropout and residual, with the bits of `random_bits`.

The backward draws the bits again, so nothing is stored but which token is which.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatron_bert_tp.errors import ArgumentError
from megatron_bert_tp.parallel.kernels import load_kernels
from megatron_bert_tp.parallel.random_bits import LANES, Place, RandomBits, dropped_share

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Number formats of the kernels; all compute in float32."""

Kernels = Literal["torch", "triton"]
"""Who computes dropout: torch, with bits that are drawn on the host, or the kernels, which draw them."""

NO_POSITION = -1
_BLOCK_COLUMNS = 256
_BLOCK_ROWS = 8
_BLOCKS_OF_A_SUM = 8
# No product is fused with a sum: both are rounded, as on the CPU, so the results are equal bit for bit.
_LAUNCH = {"block_rows": _BLOCK_ROWS, "block_columns": _BLOCK_COLUMNS, "num_warps": 4, "enable_fp_fusion": False}


@dataclass(frozen=True)
class TokenBits:
    """Whose bits the tokens of a flat row take: ``samples`` and ``positions`` are ``[tokens]`` int64.

    A position is that in the sample; `NO_POSITION` is a token that belongs to none and is kept.  Any tokens can
    stand in any order, so packed rows and slices of a sequence are just other vectors.
    """

    seed: int
    samples: Tensor
    positions: Tensor

    @classmethod
    def of(cls, bits: RandomBits, positions: int, device: torch.device) -> "TokenBits":
        """The bits of rows of ``positions`` tokens each, of one packed row of that length, or of the bits' run."""
        sequence = positions if bits.run is None else bits.run.sequence
        lengths = np.asarray(bits.lengths or (sequence,) * len(bits.samples))
        end = int(lengths.sum())
        tokens = range(end if bits.lengths is None else positions) if bits.run is None else bits.run.tokens
        of_all = np.full((2, max(end, tokens.stop)), NO_POSITION, dtype=np.int64)
        of_all[0, :end] = np.repeat(np.asarray(bits.samples, dtype=np.int64), lengths)
        of_all[1, :end] = np.arange(end) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        chosen = np.ascontiguousarray(of_all[:, tokens.start : tokens.stop])
        samples, places = torch.from_numpy(chosen).to(device, non_blocking=True)
        return cls(bits.seed, samples, places)


@dataclass(frozen=True)
class KernelBits:
    """What kernels read to draw the bits of one microbatch: made once for it, and used by all layers."""

    tokens: TokenBits
    """Of the hidden states that this rank has."""
    samples: tuple[Tensor, ...]
    """Sample numbers ``[rows]`` int64 of each group of rows that attention computes together."""

    @classmethod
    def of(
        cls,
        bits: RandomBits,
        positions: int,
        device: torch.device,
        *,
        groups: Sequence[tuple[int, ...]] | None = None,
    ) -> "KernelBits":
        """The bits of hidden states as `TokenBits.of` has them, and of all samples in one group.

        ``groups`` are the places of the samples of each group, where attention has several.
        """
        chosen = [range(len(bits.samples))] if groups is None else groups
        numbers = torch.tensor([bits.samples[place] for group in chosen for place in group], dtype=torch.int64)
        samples = numbers.to(device, non_blocking=True).split([len(group) for group in chosen])
        return cls(TokenBits.of(bits, positions, device), tuple(samples))

    def of_group(self, number: int) -> "KernelBits":
        """The same with one group alone."""
        return replace(self, samples=(self.samples[number],))


@dataclass(frozen=True)
class _Drawing:
    """Which bits of the tokens, and how many of them drop."""

    seed: int
    layer_place: int
    probability: float

    def arguments(self, features: int) -> dict[str, Any]:
        share = dropped_share(self.probability)
        return {
            "seed": self.seed,
            "layer_place": self.layer_place,
            "factor": 1 / (1 - share),
            "threshold": threshold(self.probability),
            "is_aligned": features % LANES == 0,
        }


def threshold(probability: float) -> int:
    """Lowest kept lane in the upper half of an int32."""
    return (round(dropped_share(probability) * 65536) - 32768) << 16


class _BiasDropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, product: Tensor, bias: Tensor | None, residual: Tensor | None,
        samples: Tensor, positions: Tensor, drawing: _Drawing,
    ) -> Tensor:  # fmt: skip
        num_rows, features = product.shape
        dtype = product.dtype if residual is None else torch.promote_types(product.dtype, residual.dtype)
        output = torch.empty_like(product, dtype=dtype)
        grid = (-(-num_rows // _BLOCK_ROWS), -(-features // _BLOCK_COLUMNS))
        with torch.cuda.device_of(product):
            load_kernels("dropout").forward_kernel[grid](
                output, product, product if bias is None else bias, product if residual is None else residual,
                samples, positions, num_rows, features, **drawing.arguments(features),
                has_bias=bias is not None, has_residual=residual is not None,
                **_LAUNCH,
            )  # fmt: skip
        ctx.save_for_backward(samples, positions)
        ctx.drawing, ctx.dtype = drawing, product.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        samples, positions = ctx.saved_tensors
        grad = grads[0].contiguous()
        num_rows, features = grad.shape
        has_bias = ctx.bias_dtype is not None and ctx.needs_input_grad[1]
        num_blocks = _BLOCKS_OF_A_SUM if has_bias else 1
        grid = (-(-num_rows // (_BLOCK_ROWS * num_blocks)), -(-features // _BLOCK_COLUMNS))
        grad_product = torch.empty_like(grad, dtype=ctx.dtype)
        sums = grad.new_empty((grid[0], features) if has_bias else 1, dtype=torch.float32)
        with torch.cuda.device_of(grad):
            load_kernels("dropout").backward_kernel[grid](
                grad_product, sums, grad, samples, positions, num_rows, features,
                **ctx.drawing.arguments(features), has_bias=has_bias, num_blocks=num_blocks,
                **_LAUNCH,
            )  # fmt: skip
        grad_bias = sums.sum(0).to(ctx.bias_dtype) if has_bias else None
        grad_residual = grad.to(ctx.residual_dtype) if ctx.needs_input_grad[2] else None
        return grad_product, grad_bias, grad_residual, None, None, None


def bias_dropout_add(
    product: Tensor, bias: Tensor | None, residual: Tensor | None, tokens: TokenBits | None,
    *, probability: float, layer: int, place: Place,
) -> Tensor:  # fmt: skip
    """``residual + dropout(product + bias)`` for ``[..., features]``; without ``tokens`` there is no dropout.

    The tokens are the rows of the flattened ``product``.  The result has the wider format of product and
    residual.  ArgumentError for float64 and for another number of tokens.
    """
    if tokens is None or dropped_share(probability) == 0:
        summed = product if bias is None else product + bias
        return summed if residual is None else residual + summed
    check_dtype(product)
    features = product.shape[-1]
    flat = product.contiguous().view(-1, features)
    if flat.shape[0] != tokens.samples.numel():
        raise ArgumentError(f"{tokens.samples.numel()} tokens have bits, but {flat.shape[0]} have hidden states")
    drawing = _Drawing(tokens.seed, layer << 8 | place, probability)
    other = None if residual is None else residual.expand_as(product).contiguous().view(-1, features)
    own = None if bias is None else bias.contiguous()
    result: Tensor = _BiasDropoutAdd.apply(flat, own, other, tokens.samples, tokens.positions, drawing)
    return result.view(product.shape)


def check_dtype(x: Tensor) -> None:
    """ArgumentError for a number format that the kernels do not compute in."""
    if x.dtype not in FUSED_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FUSED_DTYPES)
        raise ArgumentError(f"dropout on a GPU computes in {names}, not in {x.dtype}; set optimizer.precision")


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The kernels on CUDA, in one of `FUSED_DTYPES`, where the package triton is installed; else torch.

    With torch on CUDA the bits are the same and are drawn on the host, which takes far longer than the rest of
    a step: a caller that gets this for a CUDA device says so to its user.
    """
    is_fused = device.type == "cuda" and dtype in FUSED_DTYPES and find_spec("triton") is not None
    return "triton" if is_fused else "torch"
