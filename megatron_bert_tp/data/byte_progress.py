"""A progress bar over bytes: live in a terminal, a plain line now and then elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_PLAIN_SECONDS = 10.0  # between two plain lines


class ByteProgress:
    """Context manager that shows MB, MB/s and the time left on the standard error stream."""

    def __init__(self, title: str, total: int, *, done: int = 0):
        self._console = Console(stderr=True)
        self._title, self._total, self._done, self._before = title, total, done, done
        self._started = self._shown = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
        self._task = self._bar.add_task(title, total=total, completed=done)

    def advance(self, num_bytes: int) -> None:
        """Count ``num_bytes`` more as done."""
        self.reach(self._done + num_bytes)

    def reach(self, num_bytes: int) -> None:
        """Count ``num_bytes`` of the total as done."""
        self._done = num_bytes
        if self._console.is_terminal:
            self._bar.update(self._task, completed=self._done)
        elif time.monotonic() - self._shown >= _PLAIN_SECONDS:
            self._shown = time.monotonic()
            self._console.print(self._line(), highlight=False)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def _line(self) -> str:
        speed = (self._done - self._before) / (time.monotonic() - self._started)
        left = (self._total - self._done) / speed if speed else float("inf")
        done = f"{self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB"
        return f"{self._title}: {done}, {speed / 1e6:.2f} MB/s, {left:.0f} s left"
