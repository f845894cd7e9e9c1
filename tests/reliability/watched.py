"""A rank without torch, for tests of what watches it: ``python -m tests.reliability.watched PATH RANK SIZE WHAT``.

It says ``ready`` when it is on the board, and does WHAT when it is told to go on by a line on its input.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_bert_tp.reliability.actions import Actions, Kind
from megatron_bert_tp.reliability.board import Board
from megatron_bert_tp.reliability.limits import Limits
from megatron_bert_tp.reliability.slot import State
from megatron_bert_tp.reliability.watchdog import Watchdog

LIMITS = Limits(step=1.0, long=4.0)


def main() -> None:
    path, rank, size, what = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    if rank == 0:
        board = Board.create(path, size=size, rank=rank)
    else:
        board = Board.open(path, size=size, rank=rank, local_rank=rank)
    with Watchdog(board, LIMITS, on_hang=lambda text: print(f"told by {rank}: {text}", flush=True)):
        print("ready", flush=True)
        sys.stdin.readline()
        actions = Actions(board)
        actions.begin_step(7)
        ACTS[what](actions, board)
    print("ended", flush=True)


def waits(actions: Actions, _board: Board) -> None:
    """For a message that never comes."""
    actions.enter(Kind.MESSAGES, "waits for: gradient of microbatch 2 from rank 1 to rank 0")
    time.sleep(60)


def stuck(actions: Actions, _board: Board) -> None:
    """In a forward that never ends."""
    actions.enter(Kind.FORWARD, "forward of microbatch 2")
    never_ending_forward()


def never_ending_forward() -> None:
    time.sleep(60)


def stops(actions: Actions, _board: Board) -> None:
    actions.enter(Kind.FORWARD, "forward of microbatch 2")
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


def dies(actions: Actions, _board: Board) -> None:
    actions.enter(Kind.OPTIMIZER)
    os.kill(os.getpid(), signal.SIGKILL)


def keeps_python_locked(actions: Actions, _board: Board) -> None:
    """No other thread of this process can run: it waits for a mutex of its own, and PyDLL keeps the lock."""
    actions.enter(Kind.BACKWARD, "backward of microbatch 0")
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(256)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def saves(actions: Actions, _board: Board) -> None:
    """For longer than a step may be silent."""
    actions.enter(Kind.SAVING)
    time.sleep(2.5)


def agrees_late(actions: Actions, _board: Board) -> None:
    """Waits for a rank that `saves`."""
    actions.enter(Kind.AGREEMENT, "who shall stop")
    time.sleep(2.8)


def computes_for_long(actions: Actions, _board: Board) -> None:
    """Never silent for a second."""
    for microbatch in range(7):
        actions.enter(Kind.FORWARD, f"forward of microbatch {microbatch}")
        time.sleep(0.4)


def finds_a_hang_and_dies(actions: Actions, board: Board) -> None:
    actions.enter(Kind.GRADIENTS)
    assert board.is_first()
    board.state = State.HANGING
    os.kill(os.getpid(), signal.SIGKILL)


def says_nothing_more(actions: Actions, board: Board) -> None:
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
    waits(actions, board)


ACTS: dict[str, Callable[[Actions, Board], None]] = {
    act.__name__: act
    for act in (
        waits, stuck, stops, dies, keeps_python_locked, saves, agrees_late, computes_for_long, says_nothing_more,
        finds_a_hang_and_dies,
    )
}  # fmt: skip

if __name__ == "__main__":
    main()
