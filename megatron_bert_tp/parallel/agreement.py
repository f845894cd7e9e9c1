"""What the ranks of a launch tell each other beside training: little, on the CPU, over a communicator of its own.

Its messages meet no other ones, so a thread may use an agreement of its own while the main thread trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

_LONGEST = 2000  # bytes of a text that the other ranks get
_PREFIX = 2  # bytes in which its length stands; 0 is no text


@dataclass(frozen=True)
class Told:
    """What the first rank that has anything to tell has told."""

    rank: int
    text: str


class Agreement:
    """A gloo communicator of all ranks; every rank must make the same calls in the same order."""

    def __init__(self, group: dist.ProcessGroup | None, *, rank: int, size: int) -> None:
        self._group, self.rank, self.size = group, rank, size

    @classmethod
    def alone(cls) -> "Agreement":
        """Of one process, which agrees with itself."""
        return cls(None, rank=0, size=1)

    @classmethod
    def of_world(cls, timeout: timedelta) -> "Agreement":
        """Of all ranks of the default group, if there is one; every rank must call it."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls.alone()
        group = dist.new_group(timeout=timeout, backend="gloo")
        return cls(group, rank=dist.get_rank(), size=dist.get_world_size())

    def maximum(self, numbers: Sequence[int]) -> list[int]:
        """The largest that any rank gives, place by place."""
        largest = torch.tensor(numbers, dtype=torch.int64)
        if self._group is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return largest.tolist()

    def gathered(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of every rank, as many on each."""
        return self._all(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def texts(self, text: str | None) -> list[str | None]:
        """The text of every rank, cut to 2000 bytes."""
        return [_unpacked(row) for row in self._all(_packed(text))]

    def first(self, text: str | None) -> Told | None:
        """The first text in the order of ranks; None when no rank has any."""
        told = enumerate(self.texts(text))
        return next((Told(rank, each) for rank, each in told if each is not None), None)

    def wait(self) -> None:
        """Wait until every rank is here."""
        self.maximum([0])

    def _all(self, own: torch.Tensor) -> torch.Tensor:
        """``[size, ...]``: one row of each rank."""
        if self._group is None:
            return own.unsqueeze(0)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(rows, own, group=self._group)
        return torch.stack(rows)


def _packed(text: str | None) -> torch.Tensor:
    """``[2002]`` bytes: length, text, padding."""
    content = b"" if text is None else (text or "?").encode()[:_LONGEST]
    framed = len(content).to_bytes(_PREFIX, "big") + content
    return torch.frombuffer(bytearray(framed.ljust(_PREFIX + _LONGEST, b"\0")), dtype=torch.uint8)


def _unpacked(packed: torch.Tensor) -> str | None:
    content = bytes(packed.tolist())
    length = int.from_bytes(content[:_PREFIX], "big")
    # The cut may have split a character.
    return content[_PREFIX : _PREFIX + length].decode(errors="ignore") if length else None
