"""One writer of a corpus at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_bert_tp.data.corpus.facts import corpus_paths, temporary
from megatron_bert_tp.data.refusals import writing
from megatron_bert_tp.errors import DataError


@contextmanager
def only_writer(prefix: Path) -> Iterator[None]:
    """Context manager that keeps other processes from writing the same corpus, until it or this process ends.

    The lock is a file of its own: one of the corpus would be locked by whoever opened it before it got its last
    name.  DataError when another process holds it, or nothing can be written there.
    """
    path, named = temporary(Path(f"{prefix}.lock")), corpus_paths(prefix)[0]
    with writing(named):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path, named)
    try:
        yield
    finally:
        with writing(named):
            path.unlink(missing_ok=True)  # while it is locked: afterwards it may be another's
            os.close(descriptor)


def _locked(path: Path, named: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise DataError(
                f"{named}: another process is writing this corpus now; wait for it, or choose another --output"
            ) from error
        os.close(descriptor)  # its owner removed it between our opening and locking


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
