"""Signals that ask a run to stop become requests, which the run grants when it stands well.

torchrun gives each rank a session of its own: Ctrl-C in a terminal reaches torchrun alone, which sends SIGINT to
the process group of each rank, once.  A second Ctrl-C interrupts torchrun in its waiting, and it sends SIGTERM.
A script around it may forward what the terminal has sent already.  Therefore whatever comes within half a second
of the first SIGINT is the same Ctrl-C, and a SIGINT or SIGTERM that comes later is the second one.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

from megatron_bert_tp.errors import ExitCode

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
SAME_SECONDS = 0.5
"""SIGINT and SIGTERM so soon after the first SIGINT are the same wish."""
FAILING_SECONDS = 0.5
"""For a run that fails and was told to end: torchrun waits for it, with its own exit code in suspense."""
_HOOK_SECONDS = 0.3
_INTERVAL = 0.05
_NO_SIGNAL = b"\0"


def _ignore_signal(_name: str) -> None:
    pass


def _ignore_end(_code: ExitCode, _cause: str) -> None:
    pass


class StopRequests:
    """Context manager, for the main thread: SIGTERM, SIGUSR1, SIGINT and SIGHUP become requests to stop.

    A thread of its own notices them, so that they also count while the main thread waits in C.  A second SIGINT
    ends the process at once with code 130.  A SIGTERM ends a run that is failing already with code 7, after
    half a second.
    """

    def __init__(
        self,
        *,
        is_failing: Callable[[], bool] = lambda: False,
        on_signal: Callable[[str], None] = _ignore_signal,
        on_end: Callable[[ExitCode, str], None] = _ignore_end,
    ) -> None:
        """Both hooks are called by the watching thread.

        ``on_signal`` gets the name of each signal, and ``on_end`` code and cause before the process is ended; it
        has 0.3 seconds.
        """
        self._is_failing, self._on_signal, self._on_end = is_failing, on_signal, on_end
        self._requested: str | None = None
        self._lock, self._is_requested = threading.Lock(), threading.Event()
        self._interrupted: float | None = None
        self._ending_since: float | None = None
        self._is_terminated = False
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)

    def __enter__(self) -> "StopRequests":
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._previous_descriptor = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _note) for number in STOP_SIGNALS}
        for number in STOP_SIGNALS:
            # Not every library that waits in a system call goes on waiting when a signal interrupts it.
            signal.siginterrupt(number, False)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._previous_descriptor)
        os.write(self._write_end, _NO_SIGNAL)
        self._thread.join()
        os.close(self._read_end)
        os.close(self._write_end)

    @property
    def requested(self) -> str | None:
        """Name of the first signal, or what `request` was given; None as long as the run shall go on."""
        return self._requested

    def request(self, text: str) -> None:
        """Ask for a stop because of ``text``, unless one is asked for already; any thread may."""
        with self._lock:
            if self._requested is None:
                self._requested = text
        self._is_requested.set()

    def wait(self, seconds: float) -> bool:
        """Wait, but no longer than until a stop is asked for; whether it is."""
        return self._is_requested.wait(seconds)

    def _watch(self) -> None:
        while True:
            # Whether the run fails is looked at again and again only once it was told to end.
            timeout = _INTERVAL if self._is_terminated else None
            if select.select([self._read_end], [], [], timeout)[0]:
                numbers = os.read(self._read_end, 256)
                for number in numbers:
                    self._take(number)
                if 0 in numbers:
                    return
            if self._is_terminated:
                self._end_if_failing()

    def _take(self, number: int) -> None:
        if number not in STOP_SIGNALS:  # Python's own handlers of other signals are noted here too
            return
        name = signal.Signals(number).name
        if number in (signal.SIGINT, signal.SIGTERM) and self._is_second():
            self._end(ExitCode.INTERRUPTED, f"interrupted a second time ({name})")
        if number == signal.SIGINT and self._interrupted is None:
            self._interrupted = time.monotonic()
        self._is_terminated |= number == signal.SIGTERM
        self.request(name)
        self._on_signal(name)

    def _is_second(self) -> bool:
        return self._interrupted is not None and time.monotonic() - self._interrupted > SAME_SECONDS

    def _end_if_failing(self) -> None:
        if self._ending_since is None:
            self._ending_since = time.monotonic() if self._is_failing() else None
        elif time.monotonic() - self._ending_since > FAILING_SECONDS:
            self._end(ExitCode.PEER_LOST, "told to end (SIGTERM) while it was failing")

    def _end(self, code: ExitCode, cause: str) -> None:
        """End the process without any more ado; threads and destructors may be what hangs."""
        hook = threading.Thread(target=self._on_end, args=(code, cause), daemon=True)
        hook.start()
        hook.join(_HOOK_SECONDS)
        os._exit(code)


def _note(number: int, frame: FrameType | None) -> None:
    """Nothing: that a signal came is read from the pipe, into which Python writes it at once."""
    del number, frame
