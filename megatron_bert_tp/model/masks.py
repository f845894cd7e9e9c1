"""Additive attention masks: 0 where a query sees a key, the lowest number where it does not.

Which keys are seen is settled in bool first: two lowest numbers added would be minus infinity, and a row of
them nan.
"""

import torch
from torch import Tensor

from megatron_bert_tp.errors import LayoutError


def additive(is_seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask of the same shape; True is seen."""
    lowest = torch.finfo(dtype).min
    return torch.zeros_like(is_seen, dtype=dtype).masked_fill_(~is_seen, lowest)


def self_attention_mask(
    mask: Tensor | None, *, queries: int, keys: int, is_causal: bool, like: Tensor
) -> Tensor | None:
    """Mask that broadcasts to ``[batch, heads, queries, keys]``; None where every query sees every key.

    ``mask``: ``[batch, keys]`` says which keys are real, and is joined with the causal mask of a decoder.
    ``[batch, queries, keys]`` says it for each query and is taken as it is, and so is ``[batch, heads or 1,
    queries, keys]``, of which a floating-point one is added to the scores.  In all others, not 0 is seen.
    ``like`` gives device and number format.
    """
    if mask is not None and mask.dim() > 2:
        return _of_each_query(mask, queries=queries, keys=keys, dtype=like.dtype)
    seen = _causal(queries, keys, like.device) if is_causal and queries > 1 else None
    if mask is not None:
        _check_shape(mask, (keys,), "attention_mask")
        real = mask.bool()[:, None, None]
        seen = real if seen is None else real & seen
    return None if seen is None else additive(seen, like.dtype)


def cross_attention_mask(mask: Tensor | None, *, queries: int, keys: int, dtype: torch.dtype) -> Tensor | None:
    """The same for the encoder's ``keys``: ``mask`` is ``[batch, keys]`` or has a row for each query."""
    if mask is None:
        return None
    if mask.dim() > 2:
        return _of_each_query(mask, queries=queries, keys=keys, dtype=dtype)
    _check_shape(mask, (keys,), "encoder_attention_mask")
    return additive(mask.bool()[:, None, None], dtype)


def _of_each_query(mask: Tensor, *, queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    if mask.dim() == 3:
        _check_shape(mask, (queries, keys), "a mask of three dims")
        return additive(mask.bool()[:, None], dtype)
    if mask.dim() != 4 or mask.shape[-1] not in (1, keys) or mask.shape[-2] not in (1, queries):
        raise LayoutError(
            f"an attention mask has the shape {tuple(mask.shape)}; give [batch, keys], [batch, queries, keys] or "
            f"[batch, heads or 1, queries, keys], here with {queries} queries and {keys} keys"
        )
    if not mask.is_floating_point():
        return additive(mask.bool(), dtype)
    # A row of minus infinity would make its softmax nan.
    return mask.to(dtype).clamp(min=torch.finfo(dtype).min)


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """``[1, 1, queries, keys]`` bool: a query sees the keys up to its own; queries are the last of the keys."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)
    return seen[None, None]


def _check_shape(mask: Tensor, expected: tuple[int, ...], name: str) -> None:
    if tuple(mask.shape[1:]) != expected:
        raise LayoutError(
            f"{name} has the shape {tuple(mask.shape)}, but there are {' queries and '.join(map(str, expected))} "
            "keys; the keys of a cache count too, so give their entries of the mask as well"
        )
