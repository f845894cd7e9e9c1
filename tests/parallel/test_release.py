"""A trainer that is gone holds nothing: its communicators end with it, and their threads."""

import gc
import threading
import weakref
from pathlib import Path

from tests.support import Layout, Recipe
from tests.trainers import CORPUS_SHAPE, configure, trainer_of

RECIPE = Recipe(shape=CORPUS_SHAPE, num_steps=1)


def trained_and_dropped(settings: Path, layout: Layout) -> tuple[bool, int]:
    """Whether the gradients of a dropped trainer are still there, and threads of this process beside Python's."""
    trainer = trainer_of(configure(settings, RECIPE, layout), layout)
    trainer.train_step()
    gradients = weakref.ref(trainer.updater.gradients)
    del trainer
    gc.collect()
    return gradients() is not None, len(list(Path("/proc/self/task").iterdir())) - threading.active_count()


def test_a_dropped_trainer_leaves_no_communicator_behind(ranks, data):
    """Hooks of autograd that held the gradients held the mesh: every trainer left dozens of threads."""
    layout = Layout(data=2, pipeline=2, schedule="zb-h1")
    counts = [ranks.run(layout.world, trained_and_dropped, data, layout) for _ in range(4)]
    assert not any(is_held for answers in counts for is_held, _ in answers)
    # The first one starts what the libraries keep.
    _, second, *others = ([threads for _, threads in answers] for answers in counts)
    # A thread of a communicator may still be on its way out; one that is held would add up.
    assert all(abs(number - former) <= 1 for each in others for number, former in zip(each, second, strict=True))
