"""The place of one rank in shared memory: who it is, how it is, what it did last.

    0    process number, its start time, rank; checksum          written once
    64   time of the last sign of life                           by the watchdog
    72   state                                                   by the watchdog
    128  one record: checksum, count, time, step, kind, text     by the thread that trains, in turn:
    512  another record                                          a writer stopped half-way has left the other whole

Times are of `time.monotonic`, which all processes of a host share.
"""

import struct
import time
from dataclasses import dataclass
from enum import IntEnum
from mmap import mmap
from zlib import crc32

from megatron_bert_tp.reliability.actions import Kind
from megatron_bert_tp.reliability.process_state import Process

SIZE = 1024
LONGEST_TEXT = 200  # bytes
_IDENTITY = struct.Struct("<qqq")
_RECORD = struct.Struct("<QdqBH")
_CHECKSUM = struct.Struct("<I")
_TIME = struct.Struct("<d")
_HEARTBEAT, _STATE, _RECORDS = 64, 72, (128, 512)
_READS = 10  # of a record that is being written again and again


class State(IntEnum):
    """How a rank is, as it says itself."""

    ALIVE = 1
    FAILING = 2
    """It has an error, and is about to end."""
    HANGING = 3
    """It has found a hang: all ranks of the host show their stacks and end."""
    TOLD = 4
    """It has shown its stacks."""
    ENDED = 5


@dataclass(frozen=True)
class Action:
    """What a rank did last; ``count`` grows with each, ``time`` says when it began."""

    count: int
    time: float
    step: int
    kind: Kind
    what: str

    @property
    def words(self) -> str:
        """For people."""
        return self.what or self.kind.words


class Slot:
    """A view of ``memory`` at one rank's place."""

    def __init__(self, memory: mmap, start: int) -> None:
        self._memory, self._start = memory, start
        self._records = tuple(start + offset for offset in _RECORDS)
        self._count = 0

    def claim(self, process: Process, rank: int) -> None:
        """Make it the place of ``rank``, which begins to live."""
        self.write(Kind.STARTING, "", 0)
        self.beat()
        self.state = State.ALIVE
        self._put(0, _checked(_IDENTITY.pack(process.number, process.started, rank)))

    def write(self, kind: Kind, what: str, step: int) -> None:
        """Show another action; what is longer than 200 bytes is cut."""
        self._count += 1
        text = what.encode(errors="replace")[:LONGEST_TEXT]
        body = _RECORD.pack(self._count, time.monotonic(), step, kind, len(text)) + text
        start = self._records[self._count & 1]
        self._memory[start : start + 4 + len(body)] = _CHECKSUM.pack(crc32(body)) + body

    def beat(self) -> None:
        """Give a sign of life."""
        self._put(_HEARTBEAT, _TIME.pack(time.monotonic()))

    @property
    def state(self) -> State | None:
        """None as long as nobody has claimed the place."""
        number = self._memory[self._start + _STATE]
        return State(number) if number in set(State) else None

    @state.setter
    def state(self, state: State) -> None:
        """Say how the rank is."""
        self._memory[self._start + _STATE] = state

    def owner(self) -> tuple[Process, int] | None:
        """Process and rank; None as long as nobody has claimed the place."""
        content = _unchecked(self._bytes(0, _IDENTITY.size + _CHECKSUM.size))
        if content is None:
            return None
        number, started, rank = _IDENTITY.unpack(content)
        return Process(number, started), rank

    def heartbeat(self) -> float:
        """Time of the last sign of life."""
        seconds: float = _TIME.unpack(self._bytes(_HEARTBEAT, _TIME.size))[0]
        return seconds

    def action(self) -> Action:
        """What the rank did last."""
        for _ in range(_READS):
            found = [action for action in map(self._action, _RECORDS) if action is not None]
            if found:
                return max(found, key=lambda action: action.count)
            time.sleep(1e-4)
        return Action(0, time.monotonic(), 0, Kind.STARTING, "unknown")

    def _action(self, offset: int) -> Action | None:
        """One of the two records; None where it is half written or was never."""
        content = self._bytes(offset, _CHECKSUM.size + _RECORD.size + LONGEST_TEXT)
        count, when, step, kind, length = _RECORD.unpack_from(content, _CHECKSUM.size)
        whole = _unchecked(content[: _CHECKSUM.size + _RECORD.size + length])
        if not count or whole is None:
            return None
        # The cut may have split a character.
        return Action(count, when, step, Kind(kind), whole[_RECORD.size :].decode(errors="ignore"))

    def _put(self, offset: int, content: bytes) -> None:
        start = self._start + offset
        self._memory[start : start + len(content)] = content

    def _bytes(self, offset: int, length: int) -> bytes:
        start = self._start + offset
        return self._memory[start : start + length]


def _checked(body: bytes) -> bytes:
    return _CHECKSUM.pack(crc32(body)) + body


def _unchecked(content: bytes) -> bytes | None:
    """The body, if it is as it was written; zeros never were."""
    body = content[_CHECKSUM.size :]
    return body if any(content) and crc32(body) == _CHECKSUM.unpack_from(content)[0] else None
