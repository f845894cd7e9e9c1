"""What is said and done when a hang is found: stacks, the table of all ranks of the host, and its end."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from types import FrameType

from megatron_bert_tp.reliability.actions import Kind
from megatron_bert_tp.reliability.board import Board, Row
from megatron_bert_tp.reliability.process_state import ProcessState
from megatron_bert_tp.reliability.slot import State

STALE_SECONDS = 2.0
"""A rank without a sign of life for so long does not answer."""
STACKS_SIGNAL = signal.SIGUSR2
"""Lets a rank show its stacks whose watchdog cannot run, because something in C keeps Python's lock."""
_STANDARD_ERROR = 2
_LONGEST_STACKS = 1 << 16
_WAITING = (Kind.MESSAGES, Kind.GRADIENTS, Kind.AGREEMENT)
_UNTOLD = (State.ALIVE, State.HANGING)
_DOES_NOT_ANSWER = "does not answer"
_STACKS_PATIENCE, _TELL_PATIENCE = 0.15, 1.0


@dataclass(frozen=True)
class Standing:
    """A rank as the table shows it."""

    row: Row
    how: str
    answers: bool

    def line(self, now: float) -> str:
        """Its row of the table."""
        action = self.row.action
        return (
            f"{self.row.rank:<5} {self.row.process.number:<8} {action.step:<7} {now - action.time:>7.1f} s  "
            f"{self.how:<20} {action.words}"
        )


def standing(row: Row, *, is_own: bool = False) -> Standing:
    """How a rank of this host is, by its process and its signs of life."""
    if is_own:
        return Standing(row, ProcessState.RUNNING.value, answers=True)
    state = row.process.state
    if state in (ProcessState.GONE, ProcessState.STOPPED):
        return Standing(row, state.value, answers=False)
    if time.monotonic() - row.heartbeat > STALE_SECONDS and row.state is not State.ENDED:
        return Standing(row, _DOES_NOT_ANSWER, answers=False)
    return Standing(row, state.value, answers=True)


def stacks(rank: int) -> str:
    """Python stacks of the other threads of this process, the main thread first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    parts = [f"--- rank {rank}, process {os.getpid()}: what its threads do, the main thread first\n"]
    own = threading.get_ident()
    parts += [_stack(names.get(number, str(number)), frame) for number, frame in frames if number != own]
    return "".join(parts)[:_LONGEST_STACKS]


def say(text: str) -> None:
    """Write to standard error without its locks, which a hanging thread may hold."""
    content = text.encode(errors="replace")
    with suppress(OSError):
        while content:
            content = content[os.write(_STANDARD_ERROR, content) :]


def tell_stacks(board: Board) -> None:
    """Show the stacks of this rank, and mark that it has."""
    text = stacks(board.rank)
    with board.speaking():
        say(text)
    board.state = State.TOLD


def table(ranks: Iterable[Standing]) -> str:
    """All ranks of the host: step, last action, how long ago, state of the process."""
    now = time.monotonic()
    head = "rank  process  step     silent    state                last action\n"
    return head + "".join(f"{each.line(now)}\n" for each in sorted(ranks, key=lambda each: each.row.rank))


def cause(ranks: Iterable[Standing], *, finder: int, silent: float, limit: float) -> str:
    """One line: the rank that most likely keeps the others waiting.

    First one that does not answer; then one that computes, since the others wait for it; then the one that has
    been silent for longest.
    """
    now = time.monotonic()
    living = [each for each in ranks if each.row.state is not State.ENDED]
    first = min(living, key=lambda each: (each.answers, each.row.action.kind in _WAITING, each.row.action.time))
    action = first.row.action
    how = "is the first suspect" if first.answers else _verb(first.how)
    return (
        f"hang: rank {first.row.rank} (process {first.row.process.number}) {how}; its last action, "
        f"{now - action.time:.1f} s ago in step {action.step}: {action.words} (rank {finder} has waited for "
        f"{silent:.1f} s, its limit is {limit:g} s; where that is too short, raise run.step_timeout_seconds, or "
        "run.timeout_seconds for what is not a step)"
    )


def announce(board: Board, *, silent: float, limit: float, on_hang: Callable[[str], None]) -> None:
    """As the first who has found a hang: let all who answer show their stacks, show the table, end the others."""
    tell_stacks(board)
    _wait_for_stacks(board)
    ranks = _standings(board)
    _ask_for_stacks(ranks)
    end_silent_peers(board)
    text = cause(ranks, finder=board.rank, silent=silent, limit=limit)
    try:
        on_hang(text)  # before the table: standard error may be slow to take it
        with board.speaking():
            say(f"--- ranks of this host\n{table(ranks)}{text}\n")
    finally:
        # Only now may the others end: a launcher that sees one end sends signals to the rest.
        board.tell_hang()


def end_silent_peers(board: Board) -> None:
    """Kill the ranks of this host that do not answer: a launcher would wait long for them to end by themselves."""
    for each in _standings(board):
        if not each.answers and each.row.state is not State.ENDED:
            each.row.process.kill()


def _standings(board: Board) -> list[Standing]:
    """All ranks of the host when each has had the time to show its stacks: who has not, does not answer."""
    peers = [standing(row) for row in board.peers()]
    answers = [
        replace(each, how=_DOES_NOT_ANSWER, answers=False) if each.answers and each.row.state in _UNTOLD else each
        for each in peers
    ]
    return [standing(board.own(), is_own=True), *answers]


def _wait_for_stacks(board: Board) -> None:
    patience = time.monotonic() + _TELL_PATIENCE
    while time.monotonic() < patience:
        asked = [row for row in board.peers() if row.state in _UNTOLD]
        if not any(standing(row).answers for row in asked):
            return
        time.sleep(0.02)


def _ask_for_stacks(ranks: Iterable[Standing]) -> None:
    """Of those that run and do not answer; they are killed next, so a signal unknown to them does no harm."""
    stuck = [each.row.process for each in ranks if each.how == _DOES_NOT_ANSWER]
    for process in stuck:
        process.send(STACKS_SIGNAL)
    if stuck:
        time.sleep(_STACKS_PATIENCE)


def _stack(name: str, frame: FrameType) -> str:
    return f"{name}:\n{''.join(traceback.format_stack(frame))}"


def _verb(how: str) -> str:
    return how if how == _DOES_NOT_ANSWER else f"is {how}"
