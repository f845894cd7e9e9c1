"""Flat buffers in which rectangles of many tensors lie owner by owner, so that one even message serves them all.

With two owners, ``a`` of five rows and ``b`` of two (Rajbhandari et al. 2020, stage 1, but by rows of tensors)::

    owner 0             owner 1
    | a0 a1 a2 | b0 |   | a3 a4 -- | b1 |

Every owner has the same number of elements; what is missing in the last rows of a tensor is zero.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bert_tp.parallel.sharding import Part


@dataclass(frozen=True)
class Slot:
    """Where the rows of one rectangle lie in the run of every owner: ``share`` elements from ``offset`` on."""

    part: Part
    offset: int
    share: int

    def pairs(self, flat: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Regions of ``flat`` ``[owners, elements]`` and the rows of ``values``, of the part's shape, beside them.

        Both are views.  The owners with all their rows come in one pair, the last one with fewer in another.
        """
        if not self.share or not values.shape[0]:
            return
        columns, rows = flat[:, self.offset : self.offset + self.share], values.reshape(-1)
        num_whole, rest = divmod(len(rows), self.share)
        if num_whole:
            yield columns[:num_whole], rows[: num_whole * self.share].view(num_whole, self.share)
        if rest:
            yield columns[num_whole, :rest], rows[num_whole * self.share :]

    def own(self, run: Tensor, owned: Part) -> Tensor:
        """The rows of one owner as a view of its run ``[elements]``, in the shape of ``owned``."""
        shape = owned.local_shape
        return run[self.offset : self.offset + torch.Size(shape).numel()].view(shape)


def slots_of(parts: Sequence[Part], num_owners: int) -> tuple[Slot, ...]:
    """Slots of all parts, one behind another."""
    slots, offset = [], 0
    for part in parts:
        # From the fullest tensor rank: gradients that are equal on all of them then lie at the same places on
        # all, and are summed in the same order.
        share = part.rows_of_owner(num_owners) * torch.Size(part.local_shape[1:]).numel()
        slots.append(Slot(part, offset, share))
        offset += share
    return tuple(slots)


def in_buckets(parts: Sequence[Part], bucket_bytes: int, element_bytes: int) -> Iterator[list[Part]]:
    """Consecutive runs of parts whose elements take about ``bucket_bytes`` each."""
    bucket: list[Part] = []
    size = 0
    for part in parts:
        bucket.append(part)
        size += part.most_rows * torch.Size(part.local_shape[1:]).numel() * element_bytes
        if size >= bucket_bytes:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


class Sums:
    """Sums of gradients of some parts over the microbatches of a step."""

    def __init__(
        self, parts: Sequence[Part], *, num_owners: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots = slots_of(parts, num_owners)
        share = sum(slot.share for slot in self.slots)
        self.flat = torch.zeros(num_owners, share, dtype=dtype, device=device)
        self.num_missing = 0
        """Parts that will have more gradients in this step."""
        self._touched: set[str] = set()

    def begin(self) -> None:
        """Forget the sums before a step."""
        self.num_missing = len(self.slots)
        self._touched.clear()

    def add(self, slot: Slot, gradient: Tensor) -> None:
        """Add one microbatch's gradient of the part of ``slot``, in the part's shape."""
        is_first = slot.part.name not in self._touched
        self._touched.add(slot.part.name)
        for region, rows in slot.pairs(self.flat, gradient):
            if is_first:
                region.copy_(rows)
            else:
                region.add_(rows)

    def complete(self) -> None:
        """Zeros for the parts without any gradient in this step: the last step's sums are still there."""
        for slot in self.slots:
            if slot.part.name not in self._touched:
                self.flat[:, slot.offset : slot.offset + slot.share].zero_()


class Bucket(Sums):
    """Sums that go over the data axis, after which this rank has the run ``own`` of the total."""

    def __init__(
        self, parts: Sequence[Part], *, num_owners: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(parts, num_owners=num_owners, dtype=dtype, device=device)
        # A sum over ranks that leaves each its own run must not overwrite what it reads.
        self.own = self.flat[0] if num_owners == 1 else torch.zeros_like(self.flat[0])
