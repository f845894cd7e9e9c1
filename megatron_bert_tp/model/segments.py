"""Packed rows: several samples one behind another, for attention sorted into groups of like lengths.

Only attention looks from one position to another.  So all else runs on the packed row, without padding, and
attention on the groups: a group's samples stand in rows of their own, padded to one length::

    packed row        a a a a a b b c c c c d . .        tokens; the last two belong to no sample
    slots             a a a a a - - -   c c c c - - - -   group of length 8, with its padding
                      b b - -           d - - -           group of length 4

(Here lengths are rounded up to 4, below to `_LENGTH_MULTIPLE`.)  Nothing crosses from one sample to another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_bert_tp.model.masks import self_attention_mask

# Few groups are few calls; at most this many positions of a sample are computed in vain, and in attention alone.
_LENGTH_MULTIPLE = 32
_NO_TOKEN = -1

_Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Samples that attention computes together."""

    samples: tuple[int, ...]
    """``[rows]`` places of the samples in the packed row, counted in samples."""
    length: int
    """Positions of every row, padding included."""
    mask: Tensor | None
    """Additive attention mask ``[rows, 1, 1 or length, length]``; None where every query sees every key."""
    key_lengths: Tensor | None
    """``[rows]`` int64 tokens of each sample, where the mask says no more than that; None without a mask."""

    @property
    def num_slots(self) -> int:
        """Positions of all rows."""
        return len(self.samples) * self.length


@dataclass(frozen=True)
class Segments:
    """Where the samples of one packed row are, and how its tokens are spread over the groups' slots."""

    firsts: Tensor
    """``[samples]`` token at which each sample begins: its [CLS]."""
    groups: tuple[Group, ...]
    _token_of_slot: Tensor
    _slot_of_token: Tensor
    _padding_slots: Tensor
    _padding_tokens: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], *, is_causal: bool, like: Tensor) -> "Segments":
        """Segments of samples of these ``lengths`` in the row ``like`` ``[1, tokens, hidden]``."""
        sizes = np.asarray(lengths)
        begins = np.cumsum(sizes) - sizes
        groups, tokens = [], []
        for length, samples in _like_lengths(sizes):
            column = np.arange(length)
            is_real = column < sizes[samples, None]
            tokens.append(np.where(is_real, begins[samples, None] + column, _NO_TOKEN).ravel())
            mask = _mask(is_real, is_causal=is_causal, like=like)
            is_plain = mask is not None and not is_causal
            key_lengths = torch.from_numpy(sizes[samples]).to(like.device) if is_plain else None
            groups.append(Group(tuple(samples.tolist()), length, mask, key_lengths))
        maps = _maps(np.concatenate(tokens), like.shape[1])
        firsts, *on_device = (torch.from_numpy(values).to(like.device) for values in (begins, *maps))
        return cls(firsts, tuple(groups), *on_device)

    def spread(self, row: Tensor) -> tuple[Tensor, ...]:
        """``[1, tokens, features]`` to ``[rows, length, features]`` for each group; padding holds any numbers."""
        slots = _Reordered.apply(row[0], self._token_of_slot, self._slot_of_token, self._padding_tokens)
        parts = slots.split([group.num_slots for group in self.groups])
        return tuple(
            part.unflatten(0, (-1, group.length)) for part, group in zip(parts, self.groups, strict=True)
        )

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The way back: ``[rows, length, features]`` of each group to ``[1, tokens, features]``."""
        slots = torch.cat([part.flatten(0, 1) for part in parts])
        row: Tensor = _Reordered.apply(slots, self._slot_of_token, self._token_of_slot, self._padding_slots)
        return row[None]


def _like_lengths(sizes: _Ints) -> Iterator[tuple[int, _Ints]]:
    """Length of each group, the longest first, and the places of its samples."""
    padded = np.minimum(-(-sizes // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, sizes.max())
    for length in np.unique(padded)[::-1].tolist():
        yield length, np.flatnonzero(padded == length)


def _mask(is_real: NDArray[np.bool_], *, is_causal: bool, like: Tensor) -> Tensor | None:
    length = is_real.shape[1]
    seen = None if is_real.all() else torch.from_numpy(is_real).to(like.device)
    return self_attention_mask(seen, queries=length, keys=length, is_causal=is_causal, like=like)


def _maps(token_of_slot: _Ints, num_tokens: int) -> tuple[_Ints, _Ints, _Ints, _Ints]:
    """Token of each slot and slot of each token (0 where there is none); slots and tokens without the other."""
    is_real = token_of_slot != _NO_TOKEN
    slot_of_token = np.zeros(num_tokens, dtype=np.int64)
    slot_of_token[token_of_slot[is_real]] = np.flatnonzero(is_real)
    padding_tokens = np.arange(np.count_nonzero(is_real), num_tokens)  # samples stand at the front of the row
    return np.where(is_real, token_of_slot, 0), slot_of_token, np.flatnonzero(~is_real), padding_tokens


class _Reordered(torch.autograd.Function):
    """``rows[index]``, where ``inverse`` leads back and rows that stand for nothing (``padding``) get no gradient.

    Both ways are gathers: torch's own backward would add row by row.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, padding: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, padding)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, padding = ctx.saved_tensors
        return grads[0].index_select(0, inverse).index_fill_(0, padding, 0), None, None, None
