# mypy: disallow-untyped-decorators=False
"""Attention backward in two kernels: one owns the queries, the other the keys, so that no sum depends on timing.

With P the softmax, D = P x keep x factor and C = D V the context, the gradient of the scores is
``D x (dC V^T) - P x rowsum(dC x C)`` (Dao et al. 2022, appendix B).  Scores and bits are computed again.
"""

import triton
import triton.language as tl

from megatron_bert_tp.parallel.kernels.attention import kept_pairs, load_rows, num_keys, store_rows, tile_scores


@triton.jit
def tile_gradients(
    query: tl.tensor, key: tl.tensor, value: tl.tensor, grad: tl.tensor, mask: tl.tensor,
    shift: tl.tensor, row_sums: tl.tensor, rows: tl.tensor, columns: tl.tensor, first_key: tl.tensor,
    mask_query: tl.tensor, mask_key: tl.tensor, sequence: tl.tensor, keys: tl.tensor,
    samples: tl.tensor, head: tl.tensor, max_positions: tl.tensor, seed: tl.tensor, layer_place: tl.tensor,
    scale: tl.tensor, factor: tl.tensor, threshold: tl.constexpr, has_mask: tl.constexpr,
    has_dropout: tl.constexpr, is_aligned: tl.constexpr, precision: tl.constexpr, block_keys: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Dropped probabilities and gradients of the scores, both ``[queries, keys]`` in float32.

    ``shift`` is the largest score and the logarithm of the sum, ``[queries]`` each.
    """
    scores = tile_scores(
        query, key, mask, rows, columns, mask_query, mask_key, sequence, keys, scale, has_mask, precision
    )
    softmax = tl.exp(scores - shift[0][:, None] - shift[1][:, None])
    dropped = softmax
    if has_dropout:
        kept = kept_pairs(
            samples, head, rows, first_key, max_positions, seed, layer_place, threshold, block_keys, is_aligned
        )
        dropped = tl.where(kept, softmax * factor, 0.0)
    grad_dropped = tl.dot(grad, tl.trans(value), input_precision=precision)
    return dropped, dropped * grad_dropped - softmax * row_sums[:, None]


@triton.jit(do_not_specialize=["seed", "layer_place", "first_head"])
def queries_kernel(
    grad_packed: tl.tensor, row_sums: tl.tensor, grad_context: tl.tensor, context: tl.tensor,
    maxima: tl.tensor, log_sums: tl.tensor,
    packed: tl.tensor, mask: tl.tensor, lengths: tl.tensor, samples: tl.tensor, part: tl.tensor,
    mask_batch: tl.tensor, mask_head: tl.tensor, mask_query: tl.tensor, mask_key: tl.tensor,
    sequence: tl.tensor, num_heads: tl.tensor, first_head: tl.tensor, max_positions: tl.tensor,
    seed: tl.tensor, layer_place: tl.tensor, scale: tl.tensor, factor: tl.tensor,
    threshold: tl.constexpr, has_mask: tl.constexpr, has_lengths: tl.constexpr, has_dropout: tl.constexpr,
    is_aligned: tl.constexpr, precision: tl.constexpr, head_size: tl.constexpr, block_head: tl.constexpr,
    block_queries: tl.constexpr, block_keys: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of one tile of queries, and their ``rowsum(dC x C)`` for the other kernel."""
    blocks = tl.cdiv(sequence, block_queries)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = pair // num_heads, pair % num_heads
    rows = tl.program_id(0) % blocks * block_queries + tl.arange(0, block_queries)
    keys = num_keys(lengths, batch, sequence, has_lengths)
    head_place, query_places = pair * sequence * head_size, pair * sequence + rows
    mask += batch * mask_batch + head * mask_head
    query = load_rows(packed + head_place, rows, sequence, head_size, block_head)
    grad = load_rows(grad_context + head_place, rows, sequence, head_size, block_head)
    output = load_rows(context + head_place, rows, sequence, head_size, block_head)
    sums = tl.sum(grad.to(tl.float32) * output.to(tl.float32), axis=1)
    tl.store(row_sums + query_places, sums, mask=rows < sequence)
    largest = tl.load(maxima + query_places, mask=rows < sequence, other=0)
    log_sum = tl.load(log_sums + query_places, mask=rows < sequence, other=0)
    result = tl.zeros([block_queries, block_head], dtype=tl.float32)
    for first_key in range(0, keys, block_keys):
        columns = first_key + tl.arange(0, block_keys)
        key = load_rows(packed + head_place + part, columns, sequence, head_size, block_head)
        value = load_rows(packed + head_place + part + part, columns, sequence, head_size, block_head)
        _, grad_scores = tile_gradients(
            query, key, value, grad, mask, (largest, log_sum), sums, rows, columns, first_key,
            mask_query, mask_key, sequence, keys, samples + batch, first_head + head, max_positions, seed,
            layer_place, scale, factor, threshold, has_mask, has_dropout, is_aligned, precision, block_keys,
        )  # fmt: skip
        result += tl.dot(grad_scores.to(key.dtype), key, input_precision=precision)
    store_rows(grad_packed + head_place, result * scale, rows, sequence, head_size, block_head)


@triton.jit(do_not_specialize=["seed", "layer_place", "first_head"])
def keys_kernel(
    grad_packed: tl.tensor, row_sums: tl.tensor, grad_context: tl.tensor,
    maxima: tl.tensor, log_sums: tl.tensor,
    packed: tl.tensor, mask: tl.tensor, lengths: tl.tensor, samples: tl.tensor, part: tl.tensor,
    mask_batch: tl.tensor, mask_head: tl.tensor, mask_query: tl.tensor, mask_key: tl.tensor,
    sequence: tl.tensor, num_heads: tl.tensor, first_head: tl.tensor, max_positions: tl.tensor,
    seed: tl.tensor, layer_place: tl.tensor, scale: tl.tensor, factor: tl.tensor,
    threshold: tl.constexpr, has_mask: tl.constexpr, has_lengths: tl.constexpr, has_dropout: tl.constexpr,
    is_aligned: tl.constexpr, precision: tl.constexpr, head_size: tl.constexpr, block_head: tl.constexpr,
    block_queries: tl.constexpr, block_keys: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of one tile of keys and of their values."""
    blocks = tl.cdiv(sequence, block_keys)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = pair // num_heads, pair % num_heads
    first_key = tl.program_id(0) % blocks * block_keys
    columns = first_key + tl.arange(0, block_keys)
    keys = num_keys(lengths, batch, sequence, has_lengths)
    head_place = pair * sequence * head_size
    mask += batch * mask_batch + head * mask_head
    key = load_rows(packed + head_place + part, columns, sequence, head_size, block_head)
    value = load_rows(packed + head_place + part + part, columns, sequence, head_size, block_head)
    grad_key = tl.zeros([block_keys, block_head], dtype=tl.float32)
    grad_value = tl.zeros([block_keys, block_head], dtype=tl.float32)
    num_queries = tl.where(first_key < keys, sequence, 0)  # keys that nobody sees have no gradient
    for first_query in range(0, num_queries, block_queries):
        rows = first_query + tl.arange(0, block_queries)
        query = load_rows(packed + head_place, rows, sequence, head_size, block_head)
        grad = load_rows(grad_context + head_place, rows, sequence, head_size, block_head)
        places = pair * sequence + rows
        largest = tl.load(maxima + places, mask=rows < sequence, other=0)
        log_sum = tl.load(log_sums + places, mask=rows < sequence, other=0)
        sums = tl.load(row_sums + places, mask=rows < sequence, other=0)
        dropped, grad_scores = tile_gradients(
            query, key, value, grad, mask, (largest, log_sum), sums, rows, columns, first_key,
            mask_query, mask_key, sequence, keys, samples + batch, first_head + head, max_positions, seed,
            layer_place, scale, factor, threshold, has_mask, has_dropout, is_aligned, precision, block_keys,
        )  # fmt: skip
        grad_value += tl.dot(tl.trans(dropped).to(grad.dtype), grad, input_precision=precision)
        grad_key += tl.dot(tl.trans(grad_scores).to(query.dtype), query, input_precision=precision)
    store_rows(grad_packed + head_place + part, grad_key * scale, columns, sequence, head_size, block_head)
    store_rows(grad_packed + head_place + part + part, grad_value, columns, sequence, head_size, block_head)
