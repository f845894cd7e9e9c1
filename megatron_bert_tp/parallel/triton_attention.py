"""Attention on a GPU with the bits of `random_bits` inside: no matrix of scores and no mask is ever stored.

Forward and backward go tile by tile (Dao et al. 2022, 2023).  Saved are the packed queries, keys and values, the
context and two numbers for each query.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_bert_tp.errors import ArgumentError
from megatron_bert_tp.parallel.kernels import load_kernels
from megatron_bert_tp.parallel.random_bits import LANES, Place, RandomBits, dropped_share
from megatron_bert_tp.parallel.triton_dropout import check_dtype, threshold

LARGEST_HEAD = 128
_SMALLEST_TILE = 16  # of Triton's matrix product
_WIDE_HEAD = 64  # a wider one takes more warps
_PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


@dataclass(frozen=True)
class _Tiles:
    """Queries and keys of a tile; ``queries_of_keys`` in the kernel that owns the keys, which holds the most."""

    queries: int
    keys: int
    queries_of_keys: int
    num_warps: int
    num_stages: int


# By bytes of a number: what the compiler fits into registers, with little or no spilling.
_TILES = {
    4: _Tiles(queries=32, keys=32, queries_of_keys=32, num_warps=8, num_stages=1),
    2: _Tiles(queries=64, keys=64, queries_of_keys=32, num_warps=4, num_stages=2),
}


@dataclass(frozen=True)
class PairBits:
    """Whose bits the pairs of query and key take; ``samples`` ``[batch]`` int64, heads from ``first_head`` on."""

    seed: int
    samples: Tensor
    layer: int
    first_head: int
    max_positions: int
    place: Place = Place.ATTENTION_PROBABILITIES

    @classmethod
    def of(
        cls, bits: RandomBits, layer: int, *, heads: range, max_positions: int, device: torch.device
    ) -> "PairBits":
        """The bits of self-attention of the global ``heads``, for samples in rows of their own."""
        samples = torch.tensor(bits.samples, dtype=torch.int64).to(device, non_blocking=True)
        return cls(bits.seed, samples, layer, heads.start, max_positions)


@dataclass(frozen=True)
class _Numbers:
    """What the kernels need beside tensors."""

    seed: int = 0
    layer_place: int = 0
    first_head: int = 0
    max_positions: int = LANES
    probability: float = 0.0

    @classmethod
    def of(cls, bits: PairBits | None, probability: float) -> "_Numbers":
        if bits is None or dropped_share(probability) == 0:
            return cls()
        return cls(bits.seed, bits.layer << 8 | bits.place, bits.first_head, bits.max_positions, probability)

    def arguments(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "layer_place": self.layer_place,
            "first_head": self.first_head,
            "max_positions": self.max_positions,
            "factor": 1 / (1 - dropped_share(self.probability)),
            "threshold": threshold(self.probability),
            "has_dropout": self.probability > 0,
            "is_aligned": self.max_positions % LANES == 0,
        }


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, mask: Tensor | None, lengths: Tensor | None, samples: Tensor | None,
        numbers: _Numbers,
    ) -> Tensor:  # fmt: skip
        context = torch.empty_like(packed[0])
        statistics = packed.new_empty((2, *packed.shape[1:4]), dtype=torch.float32)
        arguments = _arguments(packed, mask, lengths, samples) | numbers.arguments()
        launch = _launch(packed, _TILES[packed.element_size()])
        with torch.cuda.device_of(packed):
            kernel = load_kernels("attention_forward").forward_kernel
            kernel[_grid(packed, launch["block_queries"])](context, *statistics, **arguments, **launch)
        ctx.save_for_backward(packed, mask, lengths, samples, context, statistics)
        ctx.numbers = numbers
        return context

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        packed, mask, lengths, samples, context, statistics = ctx.saved_tensors
        grad_packed, row_sums = torch.empty_like(packed), torch.empty_like(statistics[0])
        grad = grads[0].contiguous()
        arguments = _arguments(packed, mask, lengths, samples) | ctx.numbers.arguments()
        tiles = _TILES[packed.element_size()]
        launch, of_keys = _launch(packed, tiles), _launch(packed, replace(tiles, queries=tiles.queries_of_keys))
        kernels = load_kernels("attention_backward")
        with torch.cuda.device_of(packed):
            kernels.queries_kernel[_grid(packed, launch["block_queries"])](
                grad_packed, row_sums, grad, context, *statistics, **arguments, **launch
            )
            kernels.keys_kernel[_grid(packed, of_keys["block_keys"])](
                grad_packed, row_sums, grad, *statistics, **arguments, **of_keys
            )
        return grad_packed, None, None, None, None


def _arguments(
    packed: Tensor, mask: Tensor | None, lengths: Tensor | None, samples: Tensor | None
) -> dict[str, Any]:
    """Tensors and sizes that all kernels take; where there is no tensor, one stands in that is never read."""
    _, batch, heads, sequence, head_size = packed.shape
    strides = (0,) * 4 if mask is None else mask.expand(batch, heads, sequence, sequence).stride()
    names = ("mask_batch", "mask_head", "mask_query", "mask_key")
    return {
        "packed": packed,
        "mask": packed if mask is None else mask,
        "lengths": packed if lengths is None else lengths,
        "samples": packed if samples is None else samples,
        "part": packed.stride(0),
        **dict(zip(names, strides, strict=True)),
        "sequence": sequence,
        "num_heads": heads,
        "scale": head_size**-0.5,
        "has_mask": mask is not None,
        "has_lengths": lengths is not None,
        "precision": _PRECISIONS[torch.get_float32_matmul_precision()],
        "head_size": head_size,
        "block_head": max(_SMALLEST_TILE, _power_of_two(head_size)),
    }


def _launch(packed: Tensor, tiles: _Tiles) -> dict[str, Any]:
    """Tiles that are no larger than the sequence needs, and how a program is run."""
    needed = max(_SMALLEST_TILE, _power_of_two(packed.shape[3]))
    return {
        "block_queries": min(tiles.queries, needed),
        "block_keys": min(tiles.keys, needed),
        "num_warps": tiles.num_warps if packed.shape[-1] <= _WIDE_HEAD else 8,
        "num_stages": tiles.num_stages,
        "enable_fp_fusion": True,
    }


def _power_of_two(number: int) -> int:
    """The smallest one that is not below ``number``."""
    return 1 << (number - 1).bit_length()


def _grid(packed: Tensor, tile: int) -> tuple[int]:
    _, batch, heads, sequence, _ = packed.shape
    return (batch * heads * -(-sequence // tile),)


def attend(
    packed: Tensor,
    mask: Tensor | None,
    bits: PairBits | None,
    *,
    probability: float,
    lengths: Tensor | None = None,
) -> Tensor:
    """Attention of packed ``[3, batch, heads, sequence, head]`` to ``[batch, heads, sequence, head]``.

    ``mask``, ``[batch or 1, heads or 1, sequence or 1, sequence or 1]``, is added to the scores; of sample i only
    the first ``lengths[i]`` keys are seen.  Without ``bits`` there is no dropout.  ArgumentError for float64, for
    a head larger than `LARGEST_HEAD`, and for more positions than the elements are numbered with.
    """
    check_dtype(packed)
    _, batch, _, sequence, head_size = packed.shape
    if head_size > LARGEST_HEAD:
        raise ArgumentError(f"attention on a GPU has heads of at most {LARGEST_HEAD} features, not {head_size}")
    if bits is not None and (sequence > bits.max_positions or bits.samples.shape != (batch,)):
        raise ArgumentError(
            f"bits of {bits.samples.numel()} samples of at most {bits.max_positions} positions cannot serve "
            f"{batch} samples of {sequence} positions"
        )
    numbers = _Numbers.of(bits, probability)
    samples = bits.samples if bits is not None and numbers.probability > 0 else None
    context: Tensor = _Attention.apply(packed.contiguous(), mask, lengths, samples, numbers)
    return context
