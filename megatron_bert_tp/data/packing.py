"""How the samples of a step become microbatches: in order, in bins of like lengths, or several in one row.

Everything here is a pure function of the lengths of a step's samples, so that every rank finds the same
microbatches by itself, and with them the shapes that its neighbours will send.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_bert_tp.data.draws import Ints

WIDTH_MULTIPLE = 8
_NUM_TRIES = 8


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """What decides the microbatches of one replica."""

    packing: Literal["none", "bins", "packed"]
    size: int
    """Most samples of a microbatch where packing is none, else most tokens, padding included."""
    data_rank: int = 0
    data_size: int = 1

    def cut(self, lengths: Ints) -> list[Ints]:
        """Places in ``lengths`` (``[samples]``) of the samples of each of this replica's microbatches.

        All replicas have the same number of microbatches, of which some may be empty.  Where packing is none,
        samples are cut in order and microbatches dealt out one by one, so that their contents do not depend on
        the number of replicas; else replicas get about the same number of tokens.
        """
        bins, hands = _WAYS[self.packing](lengths, self.size, self.data_size)
        return [bins[number] if number >= 0 else np.array([], dtype=np.int64) for number in hands[self.data_rank]]


def rounded(length: int) -> int:
    """The width of a row whose content has ``length`` tokens."""
    return -(-length // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def first_fit_decreasing(lengths: Ints, capacity: int) -> list[Ints]:
    """Bins of at most ``capacity`` tokens: the longest sample first, each into the first bin with room.

    Returns the places of each bin's samples, ascending.  At most 11/9 of the fewest possible bins, and one more
    (Johnson 1973).
    """
    room = np.full(len(lengths), capacity)
    bin_of = np.empty(len(lengths), dtype=np.int64)
    num_bins = 0
    for place in np.argsort(-lengths, kind="stable").tolist():
        number = int((room[: num_bins + 1] >= lengths[place]).argmax())  # one empty bin stands behind those in use
        num_bins = max(num_bins, number + 1)
        room[number] -= lengths[place]
        bin_of[place] = number
    return _members(bin_of)


def emptiest_first(lengths: Ints, num_bins: int) -> list[Ints]:
    """So many bins of about as many tokens: the longest sample first, each into the emptiest (Graham 1969)."""
    held = np.zeros(num_bins, dtype=np.int64)
    bin_of = np.empty(len(lengths), dtype=np.int64)
    for place in np.argsort(-lengths, kind="stable").tolist():
        number = int(held.argmin())
        held[number] += lengths[place]
        bin_of[place] = number
    return _members(bin_of)


def even_bins(lengths: Ints, capacity: int, data_size: int) -> list[Ints]:
    """As many bins as first fit decreasing takes, or up to ``data_size - 1`` more, filled evenly if possible.

    Among full bins, one that is almost empty would leave replicas and pipeline stages waiting.
    """
    full = first_fit_decreasing(lengths, capacity)
    num_bins = -(-len(full) // data_size) * data_size
    even = emptiest_first(lengths, num_bins)
    if max(int(lengths[members].sum()) for members in even) <= capacity:
        return even
    # Little room is left: the smallest capacity with which that many bins are enough.
    least = max(int(lengths.max()), -(-int(lengths.sum()) // num_bins))
    for smaller in np.linspace(least, capacity, _NUM_TRIES, endpoint=False).tolist():
        even = first_fit_decreasing(lengths, int(smaller))
        if len(even) <= num_bins:
            return even
    return full


def like_lengths(lengths: Ints, capacity: int) -> list[Ints]:
    """Bins of samples of like lengths, whose padded rows hold at most ``capacity`` tokens; the longest first."""
    order = np.argsort(-lengths, kind="stable")
    bins = []
    first = 0
    while first < len(order):
        last = first + capacity // rounded(int(lengths[order[first]]))
        bins.append(np.sort(order[first:last]))
        first = last
    return bins


def deal(costs: Sequence[int], num_hands: int) -> list[list[int]]:
    """Numbers of the bins of each hand: equally many, filled up with -1, and of about the same cost.

    The dearest bin goes first, each to the cheapest hand that still lacks one.
    """
    most = -(-len(costs) // num_hands)
    hands: list[list[int]] = [[] for _ in range(num_hands)]
    held = [0] * num_hands
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        hand = min((h for h in range(num_hands) if len(hands[h]) < most), key=held.__getitem__)
        hands[hand].append(number)
        held[hand] += costs[number]
    return [_filled(hand, most) for hand in hands]


_Way = tuple[list[Ints], list[list[int]]]
"""Bins of samples, and which of them each replica computes."""


def _in_order(lengths: Ints, size: int, data_size: int) -> _Way:
    bins = np.split(np.arange(len(lengths)), range(size, len(lengths), size))
    most = -(-len(bins) // data_size)
    return bins, [_filled(list(range(rank, len(bins), data_size)), most) for rank in range(data_size)]


def _by_length(lengths: Ints, capacity: int, data_size: int) -> _Way:
    bins = like_lengths(lengths, capacity)
    return bins, deal([len(places) * rounded(int(lengths[places].max())) for places in bins], data_size)


def _packed(lengths: Ints, capacity: int, data_size: int) -> _Way:
    bins = even_bins(lengths, capacity // WIDTH_MULTIPLE * WIDTH_MULTIPLE, data_size)
    return bins, deal([int(lengths[places].sum()) for places in bins], data_size)


def _members(bin_of: Ints) -> list[Ints]:
    order = np.argsort(bin_of, kind="stable")
    return np.split(order, np.cumsum(np.bincount(bin_of))[:-1])


def _filled(numbers: list[int], most: int) -> list[int]:
    return numbers + [-1] * (most - len(numbers))


_WAYS = {"none": _in_order, "bins": _by_length, "packed": _packed}
