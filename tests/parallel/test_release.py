"""A trainer that is gone holds nothing: its communicators end with it, and their threads."""

import gc
import threading
import time
import weakref
from pathlib import Path

import torch.distributed as dist

from tests.support import Layout, Recipe
from tests.trainers import CORPUS_SHAPE, configure, trainer_of

RECIPE = Recipe(shape=CORPUS_SHAPE, num_steps=1)


def trained_and_dropped(settings: Path, layout: Layout) -> bool:
    """Whether the gradients of a dropped trainer are still there."""
    trainer = trainer_of(configure(settings, RECIPE, layout), layout)
    trainer.train_step()
    gradients = weakref.ref(trainer.updater.gradients)
    del trainer
    gc.collect()
    return gradients() is not None


def threads_left(former: list[int], seconds: float) -> int:
    """Fewest threads of this rank beside Python's, until there are no more than ``former[rank]``, or for so long.

    A thread of a communicator may still be on its way out; one that is held stays.
    """
    deadline = time.monotonic() + seconds
    fewest = num_threads()
    while fewest > former[dist.get_rank()] and time.monotonic() < deadline:
        time.sleep(0.05)
        fewest = min(fewest, num_threads())
    return fewest


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir())) - threading.active_count()


def test_a_dropped_trainer_leaves_no_communicator_behind(ranks, data):
    """Hooks of autograd that held the gradients held the mesh: every trainer left dozens of threads."""
    layout = Layout(data=2, pipeline=2, schedule="zb-h1")
    world = layout.world

    def train() -> None:
        assert not any(ranks.run(world, trained_and_dropped, data, layout))

    train()
    train()  # the first two start what the libraries keep
    before = ranks.run(world, threads_left, [0] * world, 1.0)
    for _ in range(2):
        train()
        after = ranks.run(world, threads_left, before, 10.0)
        # One more may be a library's, started late; a communicator that is held has several.
        assert all(number <= former + 1 for number, former in zip(after, before, strict=True))
