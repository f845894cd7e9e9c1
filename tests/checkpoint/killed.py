"""A process that saves and kills itself: `python -m tests.checkpoint.killed` forks one for every line it reads.

    point K ROOT STEP       three ranks save STEP; SIGKILL just before the K-th thing that it does to files in ROOT
    after SECONDS ROOT STEP three ranks save STEP, STEP + 1, ... until SIGKILL comes

It answers with a line: how the child ended, and what it would have done next.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NoReturn

import torch

from megatron_bert_tp.checkpoint.directories import Keep
from megatron_bert_tp.checkpoint.save import save_checkpoint
from megatron_bert_tp.checkpoint.slices import Rectangle
from tests.checkpoint.layouts import OneOfThreads, in_threads

NUM_RANKS = 3
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.fsync"}


def rectangle(rank: int, step: int, length: int) -> Rectangle:
    """A third of ``weight/a``, whose numbers tell rank and step."""
    shape, offsets = (NUM_RANKS, length), (rank, 0)
    return Rectangle("weight/a", shape, offsets, torch.full((1, length), 1000.0 * rank + step))


def save_as_ranks(root: Path, step: int, *, length: int) -> None:
    def work(agreement: OneOfThreads) -> None:
        given = [rectangle(agreement.rank, step, length)]
        options = {"facts": {"step": step}, "attachments": {"words": Path(__file__)}, "keep": Keep(last=1)}
        save_checkpoint(root, step, given, agreement=agreement, **options)

    raised = in_threads(NUM_RANKS, work)
    assert raised == [None] * NUM_RANKS, raised


class KillAt:
    """Ends the process before the ``number``-th event; fsync raises none of its own, so it is wrapped."""

    def __init__(self, root: Path, number: int, answer: Callable[[str], None]) -> None:
        self._root, self._left, self._answer = str(root), number, answer
        self._lock = threading.Lock()
        sync = os.fsync

        def watched_sync(descriptor: int) -> None:
            self.hear("os.fsync", (os.readlink(f"/proc/self/fd/{descriptor}"),))
            sync(descriptor)

        os.fsync = watched_sync

    def hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if event not in EVENTS or not str(arguments[0]).startswith(self._root):
            return
        with self._lock:
            self._left -= 1
            if self._left < 0:
                self._answer(f"{event} {Path(str(arguments[0])).relative_to(self._root)}")
                os.kill(os.getpid(), signal.SIGKILL)


def at_point(number: int, root: Path, step: int, answer: Callable[[str], None]) -> None:
    sys.addaudithook(KillAt(root, number, answer).hear)
    save_as_ranks(root, step, length=10)


def until_killed(root: Path, step: int) -> None:
    for number in count(step):
        save_as_ranks(root, number, length=500_000)


def in_child(kind: str, how: str, root: Path, step: int, *, answers: int) -> NoReturn:
    """What the forked process does; it never comes back."""
    try:
        if kind == "point":
            at_point(int(how), root, step, lambda text: os.write(answers, text.encode()))
        else:
            until_killed(root, step)
    finally:
        os._exit(0)


def serve() -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        kind, how, root, step = line.split()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            in_child(kind, how, Path(root), int(step), answers=writing)
        if kind == "after":
            time.sleep(float(how))
            os.kill(child, signal.SIGKILL)
        os.close(writing)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([status, os.read(reading, 1000).decode()]), flush=True)
        os.close(reading)


if __name__ == "__main__":
    serve()
