"""One job at a time writes into a folder."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from megatron_bert_tp.errors import DirectoryError

NAME = "lock"
_LONGEST = 4096  # bytes of the file that are read
_PATIENCE = 0.5  # seconds in which a process that is being ended may let go
_UNKNOWN = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What a file system answers that has no locks."""


class DirectoryLock:
    """Context manager that holds ``lock`` in ``directory`` for this process, or fails because another one does.

    The lock is the kernel's, on the open file: it goes with the process however that ends.  The file stays, and
    says who holds it or held it last.  Where the file system has no locks, ``say`` tells it in one line and
    nothing is held.
    """

    def __init__(self, directory: Path, *, say: Callable[[str], object] = print) -> None:
        self.path, self._say = directory / NAME, say
        self._file: int | None = None

    def __enter__(self) -> "DirectoryLock":
        """Errors: `DirectoryError` when another process holds it, and where the file cannot be opened."""
        # No link is followed: one that lies there would have the file that it leads to overwritten.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        try:
            self._file = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise DirectoryError(
                f"{self.path}: cannot be opened ({error.strerror}); a run locks its folder: make it one in which "
                "you can write, or choose another"
            ) from error
        try:
            if self._is_held_by_us(self._file):
                _write_owner(self._file)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Let go."""
        self._close()

    def _is_held_by_us(self, file: int) -> bool:
        """False where there are no locks."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise DirectoryError(
                        f"{self.path.parent} belongs to another job that is still running: {_owner(file)}; wait "
                        "for its end or end it, or choose another run.directory"
                    ) from error
                time.sleep(0.05)
            except OSError as error:
                if error.errno not in _UNKNOWN:
                    raise
                self._say(
                    f"warning: the file system of {self.path.parent} has no locks ({error.strerror}): see to it "
                    "yourself that no other job writes into this folder"
                )
                return False
            else:
                return True

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None


def _write_owner(file: int) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}) + "\n"
    os.ftruncate(file, 0)
    os.pwrite(file, text.encode(), 0)


def _owner(file: int) -> str:
    """Who the file says holds it, in words; anyone may have written into it."""
    try:
        values = json.loads(os.pread(file, _LONGEST, 0))
        host, pid, since = (str(values[key])[:200] for key in ("host", "pid", "since"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return "its lock does not say which"
    if not (host + pid + since).isprintable():
        return "its lock does not say which"
    return f"process {pid} on {host}, since {since}"
