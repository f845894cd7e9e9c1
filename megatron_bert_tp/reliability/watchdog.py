"""A thread in each rank that ends the run when a rank is silent for too long: nobody waits for ever."""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable
from types import TracebackType

from megatron_bert_tp.errors import ExitCode, StoppedError
from megatron_bert_tp.reliability import hang
from megatron_bert_tp.reliability.board import Board, Row
from megatron_bert_tp.reliability.limits import Limits
from megatron_bert_tp.reliability.slot import State

INTERVAL_SECONDS = 0.25
_MOST_COUNTED = 2 * INTERVAL_SECONDS
"""Seconds that one look can add to a silence: a machine that slept, or a stopped process, was not silent."""
_LAST_SECONDS = 1.7
"""From finding a hang to the end, even where standard error or the folder of the run does not take a word."""


class Watchdog:
    """Context manager around a run: gives signs of life on the board, and looks for hangs.

    A rank hangs when it has begun no action for longer than the limit of its last one.  The first rank of a host
    that finds a hang calls ``on_hang`` with the cause in a line; then all ranks of the host end with code 6.
    """

    def __init__(
        self,
        board: Board,
        limits: Limits,
        *,
        on_hang: Callable[[str], None],
        on_orphaned: Callable[[], None] = lambda: None,
        launcher: int | None = None,
    ) -> None:
        """``launcher`` is the number of the parent process, where it is one that must not go before its ranks."""
        self.limits = limits
        """May be set at any time."""
        self._board, self._on_hang = board, on_hang
        self._on_orphaned, self._launcher = on_orphaned, launcher
        self._silence = Silence()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._shows_stacks = False

    def __enter__(self) -> "Watchdog":
        if signal.getsignal(hang.STACKS_SIGNAL) is signal.SIG_DFL:
            faulthandler.register(hang.STACKS_SIGNAL, file=2, all_threads=True)
            self._shows_stacks = True
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        if self._shows_stacks:
            faulthandler.unregister(hang.STACKS_SIGNAL)
        is_in_order = kind is None or issubclass(kind, StoppedError)
        self._board.state = State.ENDED if is_in_order else State.FAILING

    def _watch(self) -> None:
        while not self._is_over.wait(INTERVAL_SECONDS):
            self._board.beat()
            self._look_for_launcher()
            own, peers = self._board.own(), self._board.peers()
            limit = self._silence.look(own, peers, self.limits)
            if limit is not None:
                self._end(limit)
            elif any(peer.state in (State.HANGING, State.TOLD) for peer in peers):
                self._follow()

    def _look_for_launcher(self) -> None:
        if self._launcher is not None and os.getppid() != self._launcher:
            self._launcher = None
            self._on_orphaned()

    def _end(self, limit: float) -> None:
        """This rank has found a hang; another one may have found it at the same time."""
        self._board.state = State.HANGING
        if not self._board.is_first():
            self._follow()
            return
        self._last_resort()
        try:
            self._announce(limit)
        finally:
            self._leave()

    def _follow(self) -> None:
        """Show the stacks of this rank, and end after the first finder; speak in its place where it has died."""
        self._last_resort()
        try:
            hang.tell_stacks(self._board)
            self._await_first()
        finally:
            self._leave()

    def _await_first(self) -> None:
        while not self._board.is_hang_told:
            # The first has let go of its place if it was killed, but also once it has told and ended.
            if self._board.is_first() and not self._board.is_hang_told:
                self._announce(self.limits.step)
                return
            time.sleep(0.02)

    def _announce(self, limit: float) -> None:
        hang.announce(self._board, silent=self._silence.seconds, limit=limit, on_hang=self._on_hang)

    def _last_resort(self) -> None:
        timer = threading.Timer(_LAST_SECONDS, self._leave)
        timer.daemon = True
        timer.start()

    def _leave(self) -> None:
        if self._board.is_first():
            hang.end_silent_peers(self._board)
        self._board.state = State.ENDED
        os._exit(ExitCode.HANG)


class Silence:
    """How long this rank has been silent, in time that it has lived through."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Since the last action, without those in which it was excused."""
        self._excused = 0.0
        self._count = 0
        self._looked = time.monotonic()

    def look(self, own: Row, peers: list[Row], limits: Limits) -> float | None:
        """Count the time since the last look; the limit where it is passed.

        While a living peer of this host is behind and does what may take long, nothing is counted, up to the long
        limit.
        """
        now = time.monotonic()
        passed = min(now - self._looked, _MOST_COUNTED)
        self._looked = now
        if own.action.count != self._count:
            self._count, self.seconds, self._excused = own.action.count, 0.0, 0.0
            passed = min(passed, max(0.0, now - own.action.time))
        limit = limits.of(own.action.kind)
        if any(limits.excuses(peer.action, own.action, now=now) and _lives(peer) for peer in peers):
            self._excused += passed
        else:
            self.seconds += passed
        is_over = self.seconds > limit or self.seconds + self._excused > limit + limits.long
        return limit if is_over else None


def _lives(peer: Row) -> bool:
    return peer.state is State.ALIVE and hang.standing(peer).answers
