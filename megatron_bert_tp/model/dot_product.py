"""Attention of queries to keys: torch's own, one with dropout whose bits no layout changes, and an open one."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bert_tp.errors import LayoutError
from megatron_bert_tp.parallel.narrow import is_narrow_on_cpu
from megatron_bert_tp.parallel.random_bits import dropped, dropped_share


class _DroppedAttention(torch.autograd.Function):
    """``dropout(softmax(q k^T / sqrt(d) + mask)) v``, keeping one matrix of probabilities and a byte mask.

    Backward, with P the softmax, D = P * keep / (1 - p) and C = D V the output: the softmax' row sums
    ``sum(dP * P)`` equal ``sum(dC * C)`` over the features (Dao et al. 2022, appendix B), so the gradient of
    the scores is ``D * (dC V^T) - P * rowsum(dC * C)``.

    Scores of 16 bits would lose more than all the rest: on CPU they and the softmax are float32.
    """

    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, mask: Tensor | None, keep: Tensor, probability: float
    ) -> Tensor:
        query, key, value = packed.flatten(1, 2)
        scale = 1 / math.sqrt(packed.shape[-1])
        if is_narrow_on_cpu(packed):
            query, key = query.float(), key.float()
        scores = torch.baddbmm(query.new_empty(()), query, key.mT, beta=0, alpha=scale)
        scores = scores.view(keep.shape)
        if mask is not None:
            scores.add_(mask.to(scores.dtype))
        softmax = torch.softmax(scores, -1).to(packed.dtype)
        context = torch.bmm(dropped(softmax, keep, probability).flatten(0, 1), value)
        ctx.save_for_backward(packed, softmax, keep, context)
        ctx.probability = probability
        return context.view(packed.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        packed, softmax, keep, context = ctx.saved_tensors
        query, key, value = packed.flatten(1, 2)
        scale = 1 / math.sqrt(packed.shape[-1])
        grad = grads[0].reshape(context.shape)
        kept = dropped(softmax, keep, ctx.probability).flatten(0, 1)
        grad_packed = torch.empty_like(packed)
        grad_query, grad_key, grad_value = grad_packed.flatten(1, 2)
        torch.bmm(kept.mT, grad, out=grad_value)
        row_sums = (grad * context).sum(-1, keepdim=True)
        grad_scores = kept.mul_(torch.bmm(grad, value.mT))
        grad_scores.addcmul_(softmax.flatten(0, 1), row_sums, value=-1).mul_(scale)
        torch.bmm(grad_scores, key, out=grad_query)
        torch.bmm(grad_scores.mT, query, out=grad_key)
        return grad_packed, None, None, None


def attend(packed: Tensor, mask: Tensor | None, keep: Tensor | None, probability: float) -> Tensor:
    """Attention of packed ``[3, batch, heads, sequence, head]`` to ``[batch, heads, sequence, head]``.

    ``mask`` is added to the scores ``[batch, heads, sequence, sequence]``; ``keep``, of that shape, is the mask
    of dropout.  Without dropout torch's own attention is used: it has no way to take our bits.
    """
    if keep is None:
        query, key, value = packed
        mask = None if mask is None else mask.to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    # Under autocast the forward would mix number formats that the backward, outside of it, could not.
    with torch.autocast(packed.device.type, enabled=False):
        context: Tensor = _DroppedAttention.apply(packed, mask, keep, probability)
    return context


def attend_openly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    keep: Tensor | None = None,
    probability: float = 0.0,
    head_mask: Tensor | None = None,
    distances: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention step by step, for what `attend` has no room for; returns the probabilities too.

    ``query`` ``[batch, heads, queries, head]`` and ``key``, ``value`` ``[batch, heads, keys, head]`` may differ in
    length.  ``distances`` ``[batch, heads, queries, keys]`` are added to the scores before they are divided by
    the root of the head size.  The probabilities are those after dropout and head mask, which multiplies them.
    """
    scores = query @ key.mT
    if distances is not None:
        scores = scores + distances
    scores = scores / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores + mask
    probabilities = scores.softmax(-1)
    if keep is not None:
        probabilities = probabilities * keep * (1 / (1 - dropped_share(probability)))
    if head_mask is not None:
        probabilities = probabilities * head_mask
    return probabilities @ value, probabilities


def distance_scores(
    query: Tensor, key: Tensor, embedding: Tensor, *, first_query: int, with_keys: bool
) -> Tensor:
    """What relative positions add to the scores: ``q . d`` (Shaw et al. 2018, section 3.2).

    ``with_keys`` adds ``k . d`` too (Huang et al. 2020, method 4).  ``embedding`` ``[2 P - 1, head]`` has the row
    ``P - 1 + i - j`` for query i and key j, counted over all positions: the queries begin at ``first_query``.
    Returns ``[batch, heads, queries, keys]``; LayoutError where a distance is beyond the embedding.
    """
    largest = embedding.shape[0] // 2
    end, keys = first_query + query.shape[2], key.shape[2]
    if max(end, keys) > largest + 1:
        raise LayoutError(
            f"relative positions reach as far as max_position_embeddings ({largest + 1}), but there are {end} "
            f"queries and {keys} keys; cut the input, or use a model with more positions"
        )
    queries = torch.arange(first_query, end, device=query.device)
    apart = embedding[queries[:, None] - torch.arange(keys, device=query.device) + largest]
    scores = torch.einsum("bhqd,qkd->bhqk", query, apart)
    if with_keys:
        scores = scores + torch.einsum("bhkd,qkd->bhqk", key, apart)
    return scores
