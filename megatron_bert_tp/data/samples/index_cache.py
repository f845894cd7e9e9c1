"""Spans kept beside their corpus: built by one process of a file system, mapped by all."""

import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TextIO

from megatron_bert_tp.data.corpus.mapped import Corpus
from megatron_bert_tp.data.samples.sample_index import (
    FACTS,
    MadeFrom,
    UnusableIndexError,
    key_of,
    read_index,
    write_index,
)
from megatron_bert_tp.data.samples.span_rule import SpanRule
from megatron_bert_tp.data.samples.spans import Spans, join_spans, span_blocks, span_types
from megatron_bert_tp.data.samples.splits import PartName, Shares, part_of
from megatron_bert_tp.errors import DataError

FORMAT = 1  # counts up whenever the same facts would lead to other spans or other files

_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL}
_LOOK_SECONDS = 0.1
_FIRST_SAY_SECONDS = 1.0  # most indexes are built sooner
_SAY_SECONDS = 30.0
_ABANDONED_SECONDS = 600.0  # a builder writes all the time

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class IndexCache:
    """Where indexes are kept, and how long to wait for one that another process builds."""

    folder: Path | None
    """None: PREFIX.samples beside each corpus."""
    wait_seconds: float
    say: Say
    """Told what is built, awaited, or not used, and why."""

    def spans(self, corpus: Corpus, *, part: PartName, split: Shares, rule: SpanRule) -> Spans:
        """The spans of one part of a corpus, mapped from a folder that is built if need be.

        The process that holds the lock file builds; the others wait.  Where nothing can be written, the spans
        are built in memory, and that is said.  DataError when the part yields no samples, or when another
        process builds for longer than ``wait_seconds``.
        """
        index = _Index(corpus, part, split, rule, self.folder or Path(f"{corpus.prefix}.samples"))
        is_built = False
        while True:
            seen = index.version()
            try:
                return read_index(index.folder, index.made_from)
            except UnusableIndexError as error:
                refusal = f"{index.name} in {index.folder} is not used: {error}" if seen else ""
            try:
                if is_built:
                    raise OSError("what was written is not what is read back")
                with _locked(index, wait_seconds=self.wait_seconds, say=self.say):
                    if index.version() == seen:  # else another process has built it in the meantime
                        self._build(index, refusal)
                        is_built = True
            except OSError as error:
                self.say(
                    f"{index.name} cannot be kept in {index.folder.parent} ({error}), so every process builds it "
                    "in its own memory: set run.index_cache to a folder that can be written and has room"
                )
                return join_spans(index.blocks())

    def _build(self, index: "_Index", refusal: str) -> None:
        """Build in a folder of this process, which then gets its name at once; the lock is held."""
        if refusal:
            self.say(f"{refusal}; it is built again")
        building = index.folder.with_name(f"{index.folder.name}.building-{socket.gethostname()}-{os.getpid()}")
        _remove_leftovers(index, building)
        started = time.monotonic()
        building.mkdir()
        try:
            self.say(f"{index.name} is built in {index.folder}")
            types = span_types(index.corpus, index.rule)
            num_samples = write_index(building, index.blocks(), types=types, made_from=index.made_from)
            _give_name(building, index.folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        self.say(f"{index.name}: {num_samples} samples in {time.monotonic() - started:.1f} s")


@dataclass(frozen=True)
class _Index:
    """One index: what it is made from, and where it belongs."""

    corpus: Corpus
    part: PartName
    split: Shares
    rule: SpanRule
    root: Path

    @cached_property
    def made_from(self) -> MadeFrom:
        return {
            "format": FORMAT,
            "corpus": self.corpus.digest,
            "split": [float(share) for share in self.split],
            "part": self.part,
            **asdict(self.rule),
        }

    @cached_property
    def folder(self) -> Path:
        return self.root / key_of(self.made_from)

    @property
    def lock(self) -> Path:
        return self.folder.with_suffix(".lock")

    @property
    def name(self) -> str:
        return f"{self.corpus.prefix}: the sample index of the {self.part} part"

    def blocks(self) -> Iterator[Spans]:
        return span_blocks(self.corpus, part_of(self.corpus.num_documents, self.split, self.part), self.rule)

    def version(self) -> tuple[int, ...]:
        """What changes when the folder is built again; empty where there is none."""
        stats = []
        for path in (self.folder, self.folder / FACTS):
            with suppress(OSError):
                stats.append(path.stat())
        return tuple(number for stat in stats for number in (stat.st_ino, stat.st_mtime_ns))


@contextmanager
def _locked(index: _Index, *, wait_seconds: float, say: Say) -> Iterator[None]:
    """Hold the lock file of an index, which the kernel frees should this process die.

    A file system without locks lets everyone in at once: each then builds a folder of its own, and the first to be
    done gives it its name.
    """
    index.root.mkdir(parents=True, exist_ok=True)
    with index.lock.open("a+", encoding="utf-8") as file:
        _wait(file, index, wait_seconds=wait_seconds, say=say)
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _wait(file: TextIO, index: _Index, *, wait_seconds: float, say: Say) -> None:
    started = time.monotonic()
    next_words = min(_FIRST_SAY_SECONDS, wait_seconds / 2)
    while not _is_locked(file):
        waited = time.monotonic() - started
        file.seek(0)
        builder = file.read() or "another process"
        if waited >= wait_seconds:
            raise DataError(
                f"{index.name} was awaited for {wait_seconds:g} s, but {builder} still builds it and holds its "
                f"lock {index.lock}: end that process if it hangs, or raise run.timeout_seconds"
            )
        if waited >= next_words:
            say(
                f"{index.name} is built by {builder}; waiting, for {wait_seconds - waited:.0f} s at most "
                f"(lock {index.lock})"
            )
            next_words += _SAY_SECONDS
        time.sleep(min(_LOOK_SECONDS, wait_seconds - waited))


def _is_locked(file: TextIO) -> bool:
    """Try to lock a file; True where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _give_name(building: Path, folder: Path) -> None:
    """Rename a folder that is whole, over one that is refused; another process' may have come first."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        building.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _remove_leftovers(index: _Index, building: Path) -> None:
    """Remove what builders of this index left behind when they were killed."""
    for folder in index.root.glob(f"{index.folder.name}.building-*"):
        if folder == building or not _is_alive(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(building: Path) -> bool:
    """Whether the process that a folder is named after may still be writing it."""
    host, _, number = building.name.partition(".building-")[2].rpartition("-")
    if host == socket.gethostname() and number.isdecimal():
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # somebody else's process has the number
    with suppress(OSError):
        newest = max(path.stat().st_mtime for path in (building, *building.iterdir()))
        return time.time() - newest < _ABANDONED_SECONDS
    return True
