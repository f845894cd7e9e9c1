"""Sizes of a microbatch, as far as memory depends on them.  Nothing here imports torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_LENGTH_MULTIPLE = 32
"""To which attention in packed rows rounds lengths, as `model.segments` does."""


@dataclass(frozen=True)
class Group:
    """Samples that attention computes together, each in a row of ``length`` positions."""

    rows: int
    length: int
    is_padded: bool = False


@dataclass(frozen=True)
class Microbatch:
    """Sizes of a microbatch: ``positions`` in all its rows, of which ``tokens`` are real, and ``masked`` places.

    ``masked`` counts those that fill up the list (`data.batch.Batch`) too.
    """

    positions: int
    tokens: int
    samples: int
    masked: int
    groups: tuple[Group, ...]
    is_packed: bool = False

    @classmethod
    def of_rows(cls, samples: int, sequence: int, *, masked: int, is_padded: bool = False) -> "Microbatch":
        """Each sample in a row of its own; ``is_padded`` where one of them is shorter."""
        positions = samples * sequence
        return cls(positions, positions, samples, masked, (Group(samples, sequence, is_padded),))

    @classmethod
    def of_packed(cls, lengths: Sequence[int], positions: int, *, masked: int) -> "Microbatch":
        """Samples of these ``lengths`` one behind another in a row of ``positions``."""
        groups = tuple(_groups_of(lengths))
        return cls(positions, sum(lengths), len(lengths), masked, groups, is_packed=True)

    @property
    def slots(self) -> int:
        """Positions of attention, the padding inside its groups included."""
        return sum(group.rows * group.length for group in self.groups)

    @property
    def squares(self) -> int:
        """Pairs of a query and a key, of one head."""
        return sum(group.rows * group.length**2 for group in self.groups)


def _groups_of(lengths: Sequence[int]) -> Iterator[Group]:
    """Samples of like lengths, the longest first."""
    padded = [min(-(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, max(lengths)) for length in lengths]
    for length in sorted(set(padded), reverse=True):
        own = [size for size, other in zip(lengths, padded, strict=True) if other == length]
        yield Group(len(own), length, min(own) < length)
