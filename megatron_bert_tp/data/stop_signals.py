"""Processes that make batches leave signals to the trainer: it stops when it has saved, and ends them itself.

torchrun, a terminal and SLURM send SIGINT, SIGTERM, SIGUSR1 and SIGHUP to whole process groups.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from threading import Thread

_ASKED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@contextmanager
def held_back_from_children() -> Iterator[None]:
    """Context manager: processes that this thread starts in it are born with these signals blocked.

    Importing torch takes them seconds, in which they could ignore nothing.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKED)
    try:
        # Python starts this process with the first worker, and unblocks signals then.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _ASKED)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals(worker: int = 0) -> None:
    """Ignore these signals in this process from now on, but for SIGTERM of the parent (``worker_init_fn``).

    A parent that takes its workers down, which multiprocessing does with SIGTERM, must be obeyed: it waits.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Thread(target=_obey, args=(os.getppid(),), name=f"signals-{worker}", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGUSR1))


def _obey(parent: int) -> None:
    while True:
        if signal.sigwaitinfo((signal.SIGTERM,)).si_pid == parent:
            os._exit(0)
