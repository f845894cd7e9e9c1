"""Which tokens of a sample are to be restored: spans of words, tried in a random order until enough are chosen."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.config.schema import MaskingConfig
from megatron_bert_tp.data.draws import Bits, Ints, Purpose, draw, streams, uniform

Flags = npt.NDArray[np.bool_]

_NUMBER = np.uint64(2**20 - 1)
"""Low bits of a sort key, which hold the number of a word in its sample."""
_TRIES = 24
"""Tries between two looks at which samples still have tokens to choose; it decides speed alone."""


def choose_tokens(
    is_text: Flags, begins_word: Flags, masking: MaskingConfig, *, seed: int, numbers: Ints
) -> Flags:
    """``[samples, width]``, True at the tokens to restore; ``is_text`` and ``begins_word`` have this shape too.

    The words of a sample are tried in a random order.  A try takes as many words, from its own on, as
    `draw_span_lengths` says, fewer where the segment ends or fewer tokens are left to be chosen, and none
    where one of them was taken before.  This is the greedy choice of Megatron-LM's
    `create_masked_lm_predictions`; unlike there, no span goes over a [SEP].
    """
    assert is_text.shape[1] <= _NUMBER, "a sort key has 20 bits for the number of a word"
    assert not is_text[:, -1].any(), "the last column belongs to [SEP] and padding"
    words = _Words.of(is_text, begins_word)
    bits = draw(streams(seed, Purpose.WORD, numbers)[:, None], np.arange(words.most + 1))
    left = _budgets(is_text.sum(axis=1), bits[:, 0], masking)
    order = _order(bits[:, 1:], words.counts)
    steps = np.zeros(is_text.shape, dtype=np.int8)  # 1 where a span begins, -1 behind it
    for first in range(0, words.most, _TRIES):
        rows = np.flatnonzero(left)
        if not len(rows):
            break
        tries = order[rows, first : first + _TRIES]
        lengths = draw_span_lengths(masking, seed=seed, numbers=numbers[rows], words=tries)
        begins, limits = words.spans(rows, tries, lengths)
        rooms = _rooms(steps, rows, begins) if masking.longest_span > 1 else None
        ends = _try_in_turn(begins, limits, rooms, left=left[rows], whole=words.last_boundary)
        left[rows] -= (ends - begins).sum(axis=0)
        is_taken = ends > begins
        steps.ravel()[begins[is_taken]] += 1
        steps.ravel()[ends[is_taken]] -= 1
    return np.cumsum(steps, axis=1, dtype=np.int8).view(np.bool_)


def draw_span_lengths(masking: MaskingConfig, *, seed: int, numbers: Ints, words: Ints) -> Ints:
    """``[samples, tries]`` lengths of the spans that begin with ``words`` (same shape, from 0 in each sample).

    P(n) ~ 1 / n or ~ (1 - span_stop)^(n - 1) (Joshi et al. 2019, section 3.1) for n = 1 to longest_span.
    """
    if masking.longest_span == 1:
        return np.ones_like(words)
    bits = draw(streams(seed, Purpose.SPAN_LENGTH, numbers)[:, None], words)
    # Without the last one, which may be rounded to less than 1.
    lengths: Ints = 1 + np.searchsorted(np.cumsum(span_length_shares(masking))[:-1], uniform(bits), side="right")
    return lengths


def span_length_shares(masking: MaskingConfig) -> npt.NDArray[np.float64]:
    """``[longest_span]`` probabilities of the lengths 1, 2 and so on."""
    lengths = np.arange(1, masking.longest_span + 1)
    weights = {"inverse": 1.0 / lengths, "geometric": (1.0 - masking.span_stop) ** (lengths - 1)}
    chosen = weights[masking.span_lengths]
    shares: npt.NDArray[np.float64] = chosen / chosen.sum()
    return shares


@dataclass(frozen=True)
class _Words:
    """Words of all samples, one after the other; a place is a flat index into ``[samples, width]``."""

    counts: Ints
    """``[samples]`` words of each."""
    boundaries: Ints
    """``[boundaries]`` places where a word begins, and where a segment ends: behind its last word."""
    of_word: Ints
    """``[words]`` index of each word's beginning in ``boundaries``."""
    segment_end: Ints
    """``[boundaries]`` index of the end of the segment that each boundary lies in."""
    last_boundary: Ints
    """``[places]`` last boundary at each place or before it."""

    @classmethod
    def of(cls, is_text: Flags, begins_word: Flags) -> "_Words":
        ends_segment = np.zeros_like(is_text)
        ends_segment[:, 1:] = is_text[:, :-1] & ~is_text[:, 1:]
        boundaries = np.flatnonzero(begins_word | ends_segment)
        is_end = ends_segment.ravel()[boundaries]
        ends = np.flatnonzero(is_end)
        is_boundary = np.zeros(is_text.size, dtype=np.int64)
        is_boundary[boundaries] = boundaries
        return cls(
            begins_word.sum(axis=1),
            boundaries,
            np.flatnonzero(~is_end),
            ends[np.cumsum(is_end) - is_end],
            np.maximum.accumulate(is_boundary),
        )

    @property
    def most(self) -> int:
        """Words of the sample that has most."""
        return int(self.counts.max())

    def spans(self, samples: Ints, numbers: Ints, lengths: Ints) -> tuple[Ints, Ints]:
        """``[tries, samples]`` places where the spans of so many words begin, and where they end at the latest.

        ``numbers`` and ``lengths`` are ``[samples, tries]``; without a word of that number both are alike.
        """
        is_word = numbers < self.counts[samples, None]
        before = (np.cumsum(self.counts) - self.counts)[samples, None]
        first = self.of_word[before + np.where(is_word, numbers, 0)]
        last = np.minimum(first + lengths * is_word, self.segment_end[first])
        return np.ascontiguousarray(self.boundaries[first].T), np.ascontiguousarray(self.boundaries[last].T)


def _budgets(num_text: Ints, bits: Bits, masking: MaskingConfig) -> Ints:
    """``[samples]`` tokens to choose: the share of the text rounded at random, so that its mean is exact."""
    budgets = np.floor(masking.probability * num_text + uniform(bits)).astype(np.int64)
    return np.clip(budgets, 1, masking.maximum)


def _order(bits: Bits, counts: Ints) -> Ints:
    """``[samples, words]`` numbers of the words in the order of their bits, then a number that is too large."""
    number = np.arange(bits.shape[1], dtype=np.uint64)
    keys = np.where(number < counts[:, None].astype(np.uint64), bits & ~_NUMBER | number, ~np.uint64(0))
    keys.sort(axis=1)
    return (keys & _NUMBER).astype(np.int64)


def _try_in_turn(begins: Ints, limits: Ints, rooms: Ints | None, *, left: Ints, whole: Ints) -> Ints:
    """``[tries, samples]`` end of the span that each try takes, which is its beginning where it takes none.

    ``rooms`` are the first places after the beginnings that are taken already, None where spans cannot
    overlap; ``left`` are the tokens still to be chosen; ``whole`` the last boundary up to each place.
    """
    ends = begins.copy()
    for number, (begin, limit, end) in enumerate(zip(begins, limits, ends, strict=True)):
        reach = whole[np.minimum(begin + left, limit)]
        fits = reach > begin
        if rooms is not None:
            fits &= reach <= rooms[number]
            # Of what begins before this end, nothing may now reach over this beginning.
            later = slice(number + 1, None)
            is_before = begins[later] < np.where(fits, reach, 0)
            np.minimum(rooms[later], begin, out=rooms[later], where=is_before)
        np.copyto(end, reach, where=fits)
        left = left - (end - begin)
        if not left.any():
            break
    return ends


def _rooms(steps: npt.NDArray[np.int8], rows: Ints, begins: Ints) -> Ints:
    """``[tries, samples]`` first taken place at each of the beginnings or after it, in the samples ``rows``."""
    height, width = len(rows), steps.shape[1]
    is_taken = np.cumsum(steps[rows], axis=1, dtype=np.int8).view(np.bool_)
    places = np.where(is_taken, np.arange(width) + width * rows[:, None], steps.size)
    following = np.minimum.accumulate(places[:, ::-1], axis=1)[:, ::-1]
    rooms: Ints = following.ravel()[begins + width * (np.arange(height) - rows)]
    return rooms
