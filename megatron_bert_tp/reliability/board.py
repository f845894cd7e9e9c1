"""What the ranks of one host show each other: shared memory that can be read while its writer is stopped or dead.

A file of mode 0600, in /dev/shm where there is one.  Its name is gone as soon as all ranks of the host have it
open, so that no end of a run leaves it behind.
"""

import errno
import fcntl
import os
import socket
import stat
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Protocol

from megatron_bert_tp.reliability.actions import Kind
from megatron_bert_tp.reliability.process_state import Process, ProcessState
from megatron_bert_tp.reliability.slot import SIZE, Action, Slot, State

_HEADER = struct.Struct("<12sI")
_MAGIC, _HEADER_SIZE = b"mbert-board1", 64
_TOLD = 32  # a byte of the header
_SHARED_MEMORY = Path("/dev/shm")
# Bytes of the file that are locked; the locks of a process go with it.
_FIRST, _SPEAKING = 0, 1
_LONGEST_SPEECH = 0.3  # seconds that a speaker is waited for


class Telling(Protocol):
    """What a board needs of `parallel.agreement.Agreement`."""

    rank: int

    def texts(self, text: str | None) -> list[str | None]:
        """The text of every rank."""

    def wait(self) -> None:
        """Wait until every rank is here."""


@dataclass(frozen=True)
class Row:
    """What the board says of one rank."""

    rank: int
    process: Process
    state: State | None
    action: Action
    heartbeat: float
    """Time of the last sign of life."""


class Board:
    """The places of all ranks of one host, seen by the rank that has the place ``local_rank``."""

    def __init__(self, memory: mmap, *, rank: int, local_rank: int, size: int, descriptor: int | None) -> None:
        self.rank, self.is_shared = rank, descriptor is not None
        self._memory, self._descriptor = memory, descriptor
        self._slots = [Slot(memory, _HEADER_SIZE + place * SIZE) for place in range(size)]
        self._place, self._own = local_rank, self._slots[local_rank]
        self._own.claim(Process.own(), rank)

    @classmethod
    def alone(cls, rank: int = 0) -> "Board":
        """Of one rank, which nobody else sees."""
        return cls(mmap(-1, _HEADER_SIZE + SIZE), rank=rank, local_rank=0, size=1, descriptor=None)

    @classmethod
    def create(cls, path: Path, *, size: int, rank: int) -> "Board":
        """Make ``path`` for ``size`` ranks; this one has place 0.  OSError where that is refused."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            # Writing into memory that the file system has no room for would end the process.
            os.posix_fallocate(descriptor, 0, _HEADER_SIZE + size * SIZE)
            memory = mmap(descriptor, _HEADER_SIZE + size * SIZE)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        memory[: _HEADER.size] = _HEADER.pack(_MAGIC, size)
        return cls(memory, rank=rank, local_rank=0, size=size, descriptor=descriptor)

    @classmethod
    def open(cls, path: Path, *, size: int, rank: int, local_rank: int) -> "Board":
        """Take a place on the board that another rank has made.  OSError where it is no such board."""
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            memory = _checked_memory(descriptor, size, path)
        except OSError:
            os.close(descriptor)
            raise
        return cls(memory, rank=rank, local_rank=local_rank, size=size, descriptor=descriptor)

    def show(self, kind: Kind, what: str, step: int) -> None:
        """What this rank does now (`actions.Sink`)."""
        self._own.write(kind, what, step)

    def beat(self) -> None:
        """Give a sign of life of this rank."""
        self._own.beat()

    @property
    def state(self) -> State | None:
        """How this rank is."""
        return self._own.state

    @state.setter
    def state(self, state: State) -> None:
        """Say how this rank is."""
        self._own.state = state

    def own(self) -> Row:
        """What the board says of this rank."""
        row = _row(self._own)
        assert row is not None
        return row

    def peers(self) -> list[Row]:
        """What it says of the others that have taken their places."""
        slots = (slot for place, slot in enumerate(self._slots) if place != self._place)
        return [row for row in map(_row, slots) if row is not None]

    def missing(self) -> str | None:
        """Peers that are gone without having ended in order, in words; None where there are none."""
        gone = [
            row
            for row in self.peers()
            if row.state is not State.ENDED and row.process.state is ProcessState.GONE
        ]
        return ", ".join(f"rank {row.rank} (process {row.process.number})" for row in gone) or None

    def is_first(self) -> bool:
        """Whether this rank is the first of the host to ask this; the answer holds until the process ends."""
        return self._locks(_FIRST)

    @property
    def is_hang_told(self) -> bool:
        """Whether the first rank that has found a hang has said all there is to say."""
        return self._memory[_TOLD] != 0

    def tell_hang(self) -> None:
        """Let the other ranks know that it is told."""
        self._memory[_TOLD] = 1

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Context manager in which no other rank of the host speaks, unless one does not stop."""
        patience = time.monotonic() + _LONGEST_SPEECH
        while not self._locks(_SPEAKING) and time.monotonic() < patience:
            time.sleep(0.005)
        try:
            yield
        finally:
            if self._descriptor is not None:
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, _SPEAKING)

    def _locks(self, place: int) -> bool:
        if self._descriptor is None:
            return True
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError as error:
            # A file system without locks: better told by two than by none.
            return error.errno not in (errno.EACCES, errno.EAGAIN)
        return True


def board_of_host(agreement: Telling, *, local_rank: int, local_world_size: int) -> Board:
    """The board that all ranks of this host share; every rank of the launch calls it.

    The first rank of a host makes it.  Where it cannot be shared, a rank has one of its own (`Board.is_shared`).
    """
    rank, host = agreement.rank, socket.gethostname()
    made, path = _made(rank, local_world_size) if local_rank == 0 else (None, None)
    try:
        texts = agreement.texts(None if path is None else f"{host}\n{path}")
        board = made or _joined(texts, host, rank=rank, local_rank=local_rank, size=local_world_size)
        agreement.wait()
    finally:
        if path is not None:
            path.unlink(missing_ok=True)
    return board


def _made(rank: int, size: int) -> tuple[Board, Path | None]:
    if size > 1:
        for folder in (_SHARED_MEMORY, Path(tempfile.gettempdir())):
            path = folder / f"megatron_bert_tp-{os.urandom(8).hex()}"
            with suppress(OSError):
                return Board.create(path, size=size, rank=rank), path
    return Board.alone(rank), None


def _joined(texts: Sequence[str | None], host: str, *, rank: int, local_rank: int, size: int) -> Board:
    """The board of this host's first rank: a launcher numbers the ranks of a host one after another."""
    there, _, path = (texts[max(0, rank - local_rank)] or "").partition("\n")
    if there == host and path:
        with suppress(OSError):
            return Board.open(Path(path), size=size, rank=rank, local_rank=local_rank)
    return Board.alone(rank)


def _checked_memory(descriptor: int, size: int, path: Path) -> mmap:
    """OSError where the file belongs to someone else, or is no board for ``size`` ranks."""
    found = os.fstat(descriptor)
    is_ours = found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) == 0o600
    if not is_ours or found.st_size != _HEADER_SIZE + size * SIZE:
        raise OSError(errno.EINVAL, f"no board for {size} ranks of this user", str(path))
    memory = mmap(descriptor, found.st_size)
    if memory[: _HEADER.size] != _HEADER.pack(_MAGIC, size):
        raise OSError(errno.EINVAL, f"no board for {size} ranks", str(path))
    return memory


def _row(slot: Slot) -> Row | None:
    owner = slot.owner()
    if owner is None:
        return None
    process, rank = owner
    return Row(rank, process, slot.state, slot.action(), slot.heartbeat())
