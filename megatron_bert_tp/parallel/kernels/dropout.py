# mypy: disallow-untyped-decorators=False
"""Bias, dropout and residual in one pass over the hidden states, and the way back, which draws the bits again.

A row is one token.  A program has a tile ``[block_rows, block_columns]`` and computes in float32.
"""

import triton
import triton.language as tl

from megatron_bert_tp.parallel.kernels.bits import tile_lanes


@triton.jit
def kept_tokens(
    samples: tl.tensor, positions: tl.tensor, rows: tl.tensor, first_column: tl.tensor,
    num_rows: tl.tensor, features: tl.tensor, seed: tl.tensor, layer_place: tl.tensor,
    threshold: tl.constexpr, block_columns: tl.constexpr, is_aligned: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Which elements of a tile are kept; element = position x features + feature, and no position keeps all."""
    sample = tl.load(samples + rows, mask=rows < num_rows, other=0)[:, None]
    position = tl.load(positions + rows, mask=rows < num_rows, other=-1)[:, None]
    firsts = position * features + first_column
    lanes = tile_lanes(seed, layer_place, sample, firsts, block_columns, is_aligned)
    return (lanes >= threshold) | (position < 0)


@triton.jit(do_not_specialize=["seed", "layer_place", "num_rows"])
def forward_kernel(
    output: tl.tensor, product: tl.tensor, bias: tl.tensor, residual: tl.tensor,
    samples: tl.tensor, positions: tl.tensor,
    num_rows: tl.tensor, features: tl.tensor, seed: tl.tensor, layer_place: tl.tensor, factor: tl.tensor,
    threshold: tl.constexpr, has_bias: tl.constexpr, has_residual: tl.constexpr,
    is_aligned: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
) -> None:  # fmt: skip
    """``output = residual + keep x factor x (product + bias)``, all ``[rows, features]`` but the bias."""
    rows = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    first_column = tl.program_id(1) * block_columns
    columns = first_column + tl.arange(0, block_columns)
    places = rows[:, None] * features + columns[None, :]
    is_inside = (rows[:, None] < num_rows) & (columns[None, :] < features)
    kept = kept_tokens(
        samples, positions, rows, first_column, num_rows, features, seed, layer_place,
        threshold, block_columns, is_aligned,
    )  # fmt: skip
    values = tl.load(product + places, mask=is_inside, other=0).to(tl.float32)
    if has_bias:
        values += tl.load(bias + columns, mask=columns < features, other=0).to(tl.float32)[None, :]
    values = tl.where(kept, values * factor, 0.0)
    if has_residual:
        values += tl.load(residual + places, mask=is_inside, other=0).to(tl.float32)
    tl.store(output + places, values.to(output.dtype.element_ty), mask=is_inside)


@triton.jit(do_not_specialize=["seed", "layer_place", "num_rows"])
def backward_kernel(
    grad_product: tl.tensor, bias_sums: tl.tensor, grad: tl.tensor, samples: tl.tensor, positions: tl.tensor,
    num_rows: tl.tensor, features: tl.tensor, seed: tl.tensor, layer_place: tl.tensor, factor: tl.tensor,
    threshold: tl.constexpr, has_bias: tl.constexpr, is_aligned: tl.constexpr,
    num_blocks: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
) -> None:  # fmt: skip
    """``grad_product = keep x factor x grad``; ``bias_sums`` ``[programs, features]`` sums it over their rows.

    A program goes through ``num_blocks`` tiles, one below the other, always in this order.
    """
    first_column = tl.program_id(1) * block_columns
    columns = first_column + tl.arange(0, block_columns)
    sums = tl.zeros([block_rows, block_columns], dtype=tl.float32)
    for number in range(num_blocks):
        block = tl.program_id(0).to(tl.int64) * num_blocks + number
        rows = block * block_rows + tl.arange(0, block_rows)
        places = rows[:, None] * features + columns[None, :]
        is_inside = (rows[:, None] < num_rows) & (columns[None, :] < features)
        kept = kept_tokens(
            samples, positions, rows, first_column, num_rows, features, seed, layer_place,
            threshold, block_columns, is_aligned,
        )  # fmt: skip
        values = tl.load(grad + places, mask=is_inside, other=0).to(tl.float32)
        values = tl.where(kept, values * factor, 0.0)
        tl.store(grad_product + places, values.to(grad_product.dtype.element_ty), mask=is_inside)
        if has_bias:
            sums += values
    if has_bias:
        place = tl.program_id(0).to(tl.int64) * features + columns
        tl.store(bias_sums + place, tl.sum(sums, axis=0), mask=columns < features)
