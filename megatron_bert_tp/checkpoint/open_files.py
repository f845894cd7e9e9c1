"""Mapped files that are read here and there, without the whole of them ending up in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

_MOST = 256 * 2**20  # bytes

Handle = TypeVar("Handle")


class OpenFiles(Generic[Handle]):
    """Files by their path, opened when they are first needed.

    What was read of a mapped file counts as memory in use as long as it is mapped; therefore all are closed
    after every 256 MiB that were read, and opened again on demand.
    """

    def __init__(self, open_file: Callable[[Path], Handle]) -> None:
        self._open_file = open_file
        self._handles: dict[Path, Handle] = {}
        self._num_read = 0

    def get(self, path: Path) -> Handle:
        """The open file at ``path``."""
        if path not in self._handles:
            self._handles[path] = self._open_file(path)
        return self._handles[path]

    def count(self, num_bytes: int) -> None:
        """Count bytes as read."""
        self._num_read += num_bytes
        if self._num_read > _MOST:
            self._handles.clear()
            self._num_read = 0
