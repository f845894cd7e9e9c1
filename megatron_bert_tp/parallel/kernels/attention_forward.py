# mypy: disallow-untyped-decorators=False
"""Attention forward: a program computes one tile of queries of one head over all keys."""

import triton
import triton.language as tl

from megatron_bert_tp.parallel.kernels.attention import kept_pairs, load_rows, num_keys, store_rows, tile_scores


@triton.jit(do_not_specialize=["seed", "layer_place", "first_head"])
def forward_kernel(
    context: tl.tensor, maxima: tl.tensor, log_sums: tl.tensor,
    packed: tl.tensor, mask: tl.tensor, lengths: tl.tensor, samples: tl.tensor, part: tl.tensor,
    mask_batch: tl.tensor, mask_head: tl.tensor, mask_query: tl.tensor, mask_key: tl.tensor,
    sequence: tl.tensor, num_heads: tl.tensor, first_head: tl.tensor, max_positions: tl.tensor,
    seed: tl.tensor, layer_place: tl.tensor, scale: tl.tensor, factor: tl.tensor,
    threshold: tl.constexpr, has_mask: tl.constexpr, has_lengths: tl.constexpr, has_dropout: tl.constexpr,
    is_aligned: tl.constexpr, precision: tl.constexpr, head_size: tl.constexpr, block_head: tl.constexpr,
    block_queries: tl.constexpr, block_keys: tl.constexpr,
) -> None:  # fmt: skip
    """Context and, for each query, the largest score and the logarithm of the sum."""
    blocks = tl.cdiv(sequence, block_queries)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = pair // num_heads, pair % num_heads
    rows = tl.program_id(0) % blocks * block_queries + tl.arange(0, block_queries)
    keys = num_keys(lengths, batch, sequence, has_lengths)
    head_base = packed + pair * sequence * head_size
    mask += batch * mask_batch + head * mask_head
    query = load_rows(head_base, rows, sequence, head_size, block_head)
    largest = tl.full([block_queries], float("-inf"), dtype=tl.float32)
    total = tl.zeros([block_queries], dtype=tl.float32)
    result = tl.zeros([block_queries, block_head], dtype=tl.float32)
    for first_key in range(0, keys, block_keys):
        columns = first_key + tl.arange(0, block_keys)
        key = load_rows(head_base + part, columns, sequence, head_size, block_head)
        scores = tile_scores(
            query, key, mask, rows, columns, mask_query, mask_key, sequence, keys, scale, has_mask, precision
        )
        # A query that has seen no key yet has minus infinity: its difference to itself would be no number.
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp(scores - finite[:, None])
        shrunk = tl.exp(largest - finite)
        total = total * shrunk + tl.sum(weights, axis=1)
        if has_dropout:
            kept = kept_pairs(
                samples + batch, first_head + head, rows, first_key, max_positions, seed, layer_place,
                threshold, block_keys, is_aligned,
            )  # fmt: skip
            weights = tl.where(kept, weights, 0.0)
        value = load_rows(head_base + part + part, columns, sequence, head_size, block_head)
        result = result * shrunk[:, None]
        result += tl.dot(weights.to(value.dtype), value, input_precision=precision)
        largest = larger
    total = tl.where(total == 0.0, 1.0, total)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    result = result * (factor / total)[:, None]
    store_rows(context + pair * sequence * head_size, result, rows, sequence, head_size, block_head)
    tl.store(maxima + pair * sequence + rows, largest, mask=rows < sequence)
    tl.store(log_sums + pair * sequence + rows, tl.log(total), mask=rows < sequence)
