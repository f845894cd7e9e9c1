"""The rectangles of which a checkpoint consists, and the proof that they cover every tensor exactly once."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import prod
from typing import NoReturn

import torch
from torch import Tensor

from megatron_bert_tp.errors import CheckpointError
from megatron_bert_tp.parallel.sharding import Part

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)
}
_MOST_COMPARED = 300


@dataclass(frozen=True)
class Rectangle:
    """What a rank hands in to be saved: ``tensor`` lies at ``offsets`` in a whole tensor of ``shape``."""

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: Tensor


@dataclass(frozen=True)
class Slice:
    """One row of the manifest: the rectangle at ``offsets`` of size ``extent``, under ``name`` in ``file``."""

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    extent: tuple[int, ...]
    dtype: str
    file: str

    @property
    def end(self) -> tuple[int, ...]:
        """First index after the rectangle in every dim."""
        return end_of(self.offsets, self.extent)


def rectangles(kind: str, held: Iterable[tuple[Part, Tensor]]) -> list[Rectangle]:
    """What this rank answers for, under ``kind/name``: a part, and a tensor of its local shape."""
    return [
        Rectangle(f"{kind}/{part.name}", part.shape, part.offsets, tensor.detach())
        for part, tensor in held
        if part.is_counted_here and 0 not in part.local_shape
    ]


def end_of(offsets: Sequence[int], extent: Sequence[int]) -> tuple[int, ...]:
    """First index after a rectangle in every dim."""
    return tuple(offset + size for offset, size in zip(offsets, extent, strict=True))


def intersection(
    offsets: Sequence[int], end: Sequence[int], row: Slice
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """First index and end, in the whole tensor, of what ``row`` holds of the rectangle; None when nothing."""
    begins = tuple(map(max, zip(offsets, row.offsets, strict=True)))
    ends = tuple(map(min, zip(end, row.end, strict=True)))
    return None if any(first >= last for first, last in zip(begins, ends, strict=True)) else (begins, ends)


def by_name(rows: Iterable[Slice]) -> dict[str, list[Slice]]:
    """Rows of each tensor."""
    grouped: dict[str, list[Slice]] = {}
    for row in rows:
        grouped.setdefault(row.name, []).append(row)
    return grouped


def check_coverage(rows: Iterable[Slice]) -> None:
    """CheckpointError unless the rows of each tensor agree and cover it completely and exactly once."""
    for name, group in by_name(rows).items():
        _check_agreement(name, group)
        if not _is_tiling(group):
            _raise_uncovered(name, group)


def _is_tiling(group: Sequence[Slice]) -> bool:
    """Whether rectangles inside their tensor cover it exactly once, in time linear in their number.

    A box is told by its corners, each with a sign: +1 where an even number of its coordinates are ends, else -1.
    Sums of boxes are told by the sums of their corners, so these must be the corners of the whole tensor.
    """
    corners: Counter[tuple[int, ...]] = Counter()
    for row in group:
        _add_corners(corners, row.offsets, row.end, 1)
    _add_corners(corners, (0,) * len(group[0].shape), group[0].shape, -1)
    return not any(corners.values())


def _add_corners(corners: Counter[tuple[int, ...]], begin: Sequence[int], end: Sequence[int], weight: int) -> None:
    for chosen in product((False, True), repeat=len(begin)):
        corner = tuple(last if is_end else first for first, last, is_end in zip(begin, end, chosen, strict=True))
        corners[corner] += weight * (-1) ** sum(chosen)


def _raise_uncovered(name: str, group: Sequence[Slice]) -> NoReturn:
    """What is wrong with a group that is no tiling; overlaps are looked for among so many rows as is quick."""
    pairs = combinations(group[:_MOST_COMPARED], 2)
    overlap = next((pair for pair in pairs if _overlap(*pair)), None)
    if overlap:
        raise CheckpointError(
            f"{name}: the rectangles at {overlap[0].offsets} in {overlap[0].file} and at "
            f"{overlap[1].offsets} in {overlap[1].file} overlap; two ranks handed in the same part"
        )
    held, whole = sum(prod(row.extent) for row in group), prod(group[0].shape)
    raise CheckpointError(
        f"{name}: the rectangles hold {held} of the {whole} numbers of shape {group[0].shape}; "
        "a rank or a file is missing"
    )


def _overlap(one: Slice, other: Slice) -> bool:
    return intersection(one.offsets, one.end, other) is not None


def _check_agreement(name: str, group: Sequence[Slice]) -> None:
    """All rows speak of the same tensor and lie inside it."""
    kinds = {(row.shape, row.dtype) for row in group}
    if len(kinds) > 1:
        raise CheckpointError(f"{name}: the rectangles disagree on shape and number format: {sorted(kinds)}")
    for row in group:
        inside = len(row.offsets) == len(row.extent) == len(row.shape) and all(
            first >= 0 and size > 0 and first + size <= whole
            for first, size, whole in zip(row.offsets, row.extent, row.shape, strict=True)
        )
        if not inside:
            raise CheckpointError(
                f"{name}: the rectangle at {row.offsets} of size {row.extent} in {row.file} does not lie "
                f"inside the shape {row.shape}"
            )
