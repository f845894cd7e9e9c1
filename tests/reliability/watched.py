"""A rank without torch, for tests of what watches it.

``python -m tests.reliability.watched PATH RANK SIZE PACE WHAT``: it says ``ready`` when it is on the board, and
does WHAT when it is told to go on by a line on its input.  Limits and what takes its time are PACE times as long.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_bert_tp.reliability.actions import Actions, Kind
from megatron_bert_tp.reliability.board import Board
from megatron_bert_tp.reliability.limits import Limits
from megatron_bert_tp.reliability.slot import State
from megatron_bert_tp.reliability.watchdog import Watchdog

LIMITS = Limits(step=1.0, long=4.0)


@dataclass(frozen=True)
class Rank:
    """What an act may use."""

    actions: Actions
    board: Board
    pace: float

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds * self.pace)


def main() -> None:
    path, rank, size, pace, what = Path(sys.argv[1]), *map(int, sys.argv[2:4]), float(sys.argv[4]), sys.argv[5]
    limits = Limits(step=LIMITS.step * pace, long=LIMITS.long * pace)
    if rank == 0:
        board = Board.create(path, size=size, rank=rank)
    else:
        board = Board.open(path, size=size, rank=rank, local_rank=rank)
    with Watchdog(board, limits, on_hang=lambda text: print(f"told by {rank}: {text}", flush=True)):
        print("ready", flush=True)
        sys.stdin.readline()
        actions = Actions(board)
        actions.begin_step(7)
        ACTS[what](Rank(actions, board, pace))
    print("ended", flush=True)


def waits(rank: Rank) -> None:
    """For a message that never comes."""
    rank.actions.enter(Kind.MESSAGES, "waits for: gradient of microbatch 2 from rank 1 to rank 0")
    time.sleep(60)


def stuck(rank: Rank) -> None:
    """In a forward that never ends."""
    rank.actions.enter(Kind.FORWARD, "forward of microbatch 2")
    never_ending_forward()


def never_ending_forward() -> None:
    time.sleep(60)


def stops(rank: Rank) -> None:
    rank.actions.enter(Kind.FORWARD, "forward of microbatch 2")
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


def dies(rank: Rank) -> None:
    rank.actions.enter(Kind.OPTIMIZER)
    os.kill(os.getpid(), signal.SIGKILL)


def keeps_python_locked(rank: Rank) -> None:
    """No other thread of this process can run: it waits for a mutex of its own, and PyDLL keeps the lock."""
    rank.actions.enter(Kind.BACKWARD, "backward of microbatch 0")
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(256)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def saves(rank: Rank) -> None:
    """For longer than a step may be silent."""
    rank.actions.enter(Kind.SAVING)
    rank.sleep(2.5)


def agrees_late(rank: Rank) -> None:
    """Waits for a rank that `saves`."""
    rank.actions.enter(Kind.AGREEMENT, "who shall stop")
    rank.sleep(2.8)


def computes_for_long(rank: Rank) -> None:
    """Never silent for as long as a step may be."""
    for microbatch in range(6):
        rank.actions.enter(Kind.FORWARD, f"forward of microbatch {microbatch}")
        for _ in range(20):  # in pieces: a process that was stopped in one of them has the others before it
            rank.sleep(0.02)


def finds_a_hang_and_dies(rank: Rank) -> None:
    rank.actions.enter(Kind.GRADIENTS)
    assert rank.board.is_first()
    rank.board.state = State.HANGING
    os.kill(os.getpid(), signal.SIGKILL)


def says_nothing_more(rank: Rank) -> None:
    """Its standard error takes no more words."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    try:
        while True:
            os.write(write_end, bytes(4096))
    except BlockingIOError:
        os.set_blocking(write_end, True)
    os.dup2(write_end, 2)
    del read_end
    waits(rank)


ACTS: dict[str, Callable[[Rank], None]] = {
    act.__name__: act
    for act in (
        waits, stuck, stops, dies, keeps_python_locked, saves, agrees_late, computes_for_long, says_nothing_more,
        finds_a_hang_and_dies,
    )
}  # fmt: skip

if __name__ == "__main__":
    main()
