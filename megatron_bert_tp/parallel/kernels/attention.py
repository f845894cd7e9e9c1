# mypy: disallow-untyped-decorators=False
"""What both ways of attention share: tiles of queries, keys and values, their scores, and which pairs are kept.

Attention goes tile by tile and never holds a matrix of scores (Dao et al. 2022, 2023).  Softmax keeps two numbers
a query: the largest score, and the logarithm of the sum of ``exp(score - largest)``.  Their sum alone would not
do: beside the lowest float, with which masks are made, the logarithm would vanish.

``part`` leads from queries to keys and from keys to values.  It is added to an address twice, since twice its
number may be more than its 32 bits hold.
"""

import triton
import triton.language as tl

from megatron_bert_tp.parallel.kernels.bits import tile_lanes


@triton.jit
def load_rows(
    base: tl.tensor, rows: tl.tensor, sequence: tl.tensor, head_size: tl.constexpr, block_head: tl.constexpr
) -> tl.tensor:
    """Rows of one head, ``[rows, block_head]``; what is outside is zero."""
    features = tl.arange(0, block_head)
    is_inside = (rows[:, None] < sequence) & (features[None, :] < head_size)
    return tl.load(base + rows[:, None] * head_size + features[None, :], mask=is_inside, other=0)


@triton.jit
def store_rows(
    base: tl.tensor, values: tl.tensor, rows: tl.tensor, sequence: tl.tensor,
    head_size: tl.constexpr, block_head: tl.constexpr,
) -> None:  # fmt: skip
    """The way back of `load_rows`."""
    features = tl.arange(0, block_head)
    is_inside = (rows[:, None] < sequence) & (features[None, :] < head_size)
    places = base + rows[:, None] * head_size + features[None, :]
    tl.store(places, values.to(base.dtype.element_ty), mask=is_inside)


@triton.jit
def num_keys(lengths: tl.tensor, batch: tl.tensor, sequence: tl.tensor, has_lengths: tl.constexpr) -> tl.tensor:
    """Keys that the queries of a sample see."""
    keys = sequence
    if has_lengths:
        keys = tl.minimum(tl.load(lengths + batch).to(tl.int32), sequence)
    return keys


@triton.jit
def tile_scores(
    query: tl.tensor, key: tl.tensor, mask: tl.tensor, rows: tl.tensor, columns: tl.tensor,
    mask_query: tl.tensor, mask_key: tl.tensor, sequence: tl.tensor, keys: tl.tensor, scale: tl.tensor,
    has_mask: tl.constexpr, precision: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Scores ``[queries, keys]`` with the mask added; minus infinity at keys that are not there."""
    scores = tl.dot(query, tl.trans(key), input_precision=precision) * scale
    if has_mask:
        is_inside = (rows[:, None] < sequence) & (columns[None, :] < sequence)
        places = rows[:, None].to(tl.int64) * mask_query + columns[None, :] * mask_key
        scores += tl.load(mask + places, mask=is_inside, other=0).to(tl.float32)
    return tl.where(columns[None, :] < keys, scores, float("-inf"))


@triton.jit
def kept_pairs(
    samples: tl.tensor, head: tl.tensor, rows: tl.tensor, first_key: tl.tensor, max_positions: tl.tensor,
    seed: tl.tensor, layer_place: tl.tensor,
    threshold: tl.constexpr, block_keys: tl.constexpr, is_aligned: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Which pairs of a tile are kept; element = (global head x max_positions + query) x max_positions + key.

    ``samples`` points to the number of the one sample of the tile.
    """
    firsts = (head * max_positions + rows[:, None]) * max_positions + first_key
    sample = tl.zeros([1, 1], dtype=tl.int64) + tl.load(samples)
    return tile_lanes(seed, layer_place, sample, firsts, block_keys, is_aligned) >= threshold
