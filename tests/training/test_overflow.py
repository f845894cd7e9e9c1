"""Float16: one rank's overflow makes all ranks skip the same step, and nothing has moved."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_bert_tp.errors import NotFiniteError
from megatron_bert_tp.parallel.gradients import Gradients
from megatron_bert_tp.training.trainer import Trainer
from tests.support import Layout, Recipe
from tests.test_layouts import name_of
from tests.trainers import CORPUS_SHAPE, configure, run, trainer_of
from tests.training.runs import pretrain, records
from tests.training.spoiling import state_of

SHAPE = replace(CORPUS_SHAPE, num_hidden_layers=4)
RECIPE = Recipe(shape=SHAPE, dtype=torch.float16, num_steps=5, rate=1e-3, clip_norm=0.5)
EVERYTHING = Layout(data=2, pipeline=2, tensor=2, schedule="zb-v", virtual=2, sequence=True, shards=True)
SHARDED = Layout(data=2, pipeline=2, tensor=2, shards=True)
LAYOUTS = [Layout(), SHARDED, Layout(tensor=2, sequence=True), EVERYTHING]
SCALE = 2.0**12


@dataclass(frozen=True)
class Seen:
    """What a rank knows after a step."""

    scale: float
    next_scale: float
    is_skipped: bool
    num_updates: int
    counters: frozenset[float]
    num_changed: int
    num_tensors: int


class Spoiler:
    """On the last rank, the first gradient of a split tensor in every bad step gets one infinite element."""

    def __init__(self) -> None:
        self.is_armed = False
        self._accumulate = Gradients.accumulate

    def __call__(self, gradients, parameter, gradient) -> None:
        # Replicated gradients are equal on all tensor ranks: none of them alone can overflow.
        is_own = all(slot.part.dim is not None for _, slot in gradients._pending[id(parameter)].slots)
        if self.is_armed and is_own and dist.get_rank() == dist.get_world_size() - 1:
            gradient = gradient.clone()
            gradient.view(-1)[0] = torch.inf
            self.is_armed = False
        self._accumulate(gradients, parameter, gradient)

    def taken(self, trainer: Trainer, *, is_bad: bool):
        def accumulate(gradients, parameter, gradient):
            self(gradients, parameter, gradient)

        self.is_armed = is_bad
        for stage in trainer.chunks:  # products that were put off come along another way
            stage.weight_gradients.deliver = partial(accumulate, trainer.updater.gradients)
        with patch.object(Gradients, "accumulate", accumulate):
            return trainer.train_step()


def counters_of(trainer: Trainer) -> frozenset[float]:
    optimizer = trainer.updater.optimizer
    return frozenset(float(state["step"]) for state in optimizer.state.values())


def train_spoilt(
    settings: Path, recipe: Recipe, layout: Layout, bad: Sequence[int], *overrides: str
) -> list[Seen]:
    trainer = trainer_of(configure(settings, recipe, layout, *overrides), layout)
    spoiler, seen = Spoiler(), []
    for step in range(1, recipe.num_steps + 1):
        before = state_of(trainer)
        update = spoiler.taken(trainer, is_bad=step in bad).update
        changed = [not torch.equal(old, new) for old, new in zip(before, state_of(trainer), strict=True)]
        assert math.isfinite(update.grad_norm) == (not update.is_skipped)
        counts = (trainer.updater.updates_done, counters_of(trainer))
        seen.append(
            Seen(update.loss_scale, trainer.updater.scale, update.is_skipped, *counts, sum(changed), len(changed))
        )
    return seen


def scaled(initial: float = SCALE, *, hysteresis: int = 1, interval: int = 1000, most: int = 50) -> list[str]:
    numbers = {"initial": initial, "hysteresis": hysteresis, "growth_interval": interval, "most_skips": most}
    return [f"optimizer.loss_scale.{name}={value}" for name, value in numbers.items()]


def assert_ranks_agree(ranks_seen: Sequence[Sequence[Seen]]) -> list[Seen]:
    for steps in zip(*ranks_seen, strict=True):
        assert len({(s.scale, s.next_scale, s.is_skipped, s.num_updates, s.counters) for s in steps}) == 1
        # Of what a rank holds some stays as it is: rows of other words, and padding.
        assert all(s.num_changed == 0 if s.is_skipped else s.num_changed > s.num_tensors / 2 for s in steps)
    return list(ranks_seen[0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_all_ranks_skip_the_step_halve_the_scale_and_leave_everything_as_it_was(ranks, data, layout):
    found = assert_ranks_agree(ranks.run(layout.world, train_spoilt, data, RECIPE, layout, (1, 3), *scaled()))
    assert [step.is_skipped for step in found] == [True, False, True, False, False]
    assert [step.scale / SCALE for step in found] == [1, 1 / 2, 1 / 2, 1 / 4, 1 / 4]
    assert found[-1].next_scale == SCALE / 4
    assert [step.num_updates for step in found] == [0, 1, 1, 2, 3]
    # What bias correction counts.
    assert [step.counters for step in found] == [{0.0}, {1.0}, {1.0}, {2.0}, {3.0}]


def test_with_hysteresis_the_scale_halves_at_the_second_overflow(ranks, data):
    layout = LAYOUTS[1]
    given = (data, RECIPE, layout, (2, 4), *scaled(hysteresis=2))
    found = assert_ranks_agree(ranks.run(layout.world, train_spoilt, *given))
    assert [step.is_skipped for step in found] == [False, True, False, True, False]
    assert [step.next_scale / SCALE for step in found] == [1, 1, 1, 1 / 2, 1 / 2]


def test_the_scale_doubles_after_so_many_finite_steps_in_a_row(ranks, data):
    layout = LAYOUTS[2]
    given = (data, RECIPE, layout, (2,), *scaled(interval=2))
    found = assert_ranks_agree(ranks.run(layout.world, train_spoilt, *given))
    assert [step.next_scale / SCALE for step in found] == [1, 1 / 2, 1 / 2, 1, 1]


def first_update(settings: Path, *overrides: str) -> float:
    """Largest distance of the first update, after two skipped steps, from AdamW's formula at t = 1."""
    recipe = replace(RECIPE, num_steps=10)
    trainer = trainer_of(configure(settings, recipe, Layout(), *overrides), Layout())
    spoiler = Spoiler()
    for _ in range(2):
        assert spoiler.taken(trainer, is_bad=True).update.is_skipped
    owned = [each for each in trainer.updater.weights.owned if each.weight.ndim == 2]
    before = [each.weight.clone() for each in owned]
    update = trainer.train_step().update
    distances = []
    for old, each in zip(before, owned, strict=True):
        direction = each.gradient / (each.gradient.abs() + 1e-8) + update.weight_decay * old
        distances.append((each.weight - (old - update.learning_rate * direction)).abs().max().item())
    return max(distances)


def test_the_first_update_after_skipped_steps_has_the_bias_correction_of_the_first(ranks, data):
    (distance,) = ranks.run(1, first_update, data, *scaled())
    # Float32 weights of size 1 at most, and a few roundings: 6e-8 each. At t = 3 it would be 6e-4.
    assert distance < 5e-7


def gives_up(settings: Path, layout: Layout, *overrides: str) -> tuple[int, str, bool]:
    """Step of the error, its text, and whether the weights are those of the beginning."""
    trainer = trainer_of(configure(settings, RECIPE, layout, *overrides), layout)
    spoiler, before = Spoiler(), state_of(trainer)
    for step in range(1, RECIPE.num_steps + 1):
        try:
            spoiler.taken(trainer, is_bad=True)
        except NotFiniteError as error:
            return step, str(error), all(map(torch.equal, before, state_of(trainer)))
    return 0, "", False


def test_after_too_many_skipped_steps_all_ranks_give_up_alike(ranks, data):
    answers = ranks.run(8, gives_up, data, LAYOUTS[1], *scaled(most=3))
    assert len(set(answers)) == 1
    step, text, is_unchanged = answers[0]
    assert (step, is_unchanged) == (3, True)
    assert text.startswith("step 3 (samples 16 to 23): 3 steps in a row have overflowed in float16, down to a ")
    assert "optimizer.precision=bfloat16" in text


def test_a_run_that_always_overflows_ends_with_one_message(data, tmp_path):
    scale = ("optimizer.precision=float16", *scaled(1e30, most=3), "optimizer.loss_scale.minimum=1e30")
    done = pretrain(data, f"run.directory={tmp_path}/run", "parallel.tensor=2", *scale, processes=2)
    assert done.returncode != 0
    told = re.findall(r"^error on rank \d: (.*?): (.*) in float16", done.stderr, re.MULTILINE)
    assert told == [("step 3 (samples 16 to 23)", "3 steps in a row have overflowed")]
    rows = records(tmp_path / "run", "step")
    assert [(row["step"], row["skipped"], row["loss_scale"]) for row in rows] == [(1, 1, 1e30), (2, 1, 1e30)]
    assert all(math.isnan(row["grad_norm"]) and row["loss"] < 10 for row in rows)
    # Strict JSON has no Infinity.
    assert '"grad_norm": null' in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert done.stdout.count("scale 1e+30 overflowed, step skipped") == 2


def test_a_scale_that_is_too_large_falls_by_itself_and_the_run_trains(ranks, data, tmp_path):
    recipe, layout = replace(RECIPE, num_steps=12), LAYOUTS[1]
    quiet = (f"run.directory={tmp_path}/run", "run.evaluation_samples=0", "run.log_every=100")
    ranks.run(layout.world, run, data, recipe, layout, *quiet, *scaled(2.0**24))
    rows = records(tmp_path / "run", "step")
    skipped = [row["skipped"] for row in rows]
    num_skipped = sum(skipped)
    # Halved at each of the first steps, and never again.
    assert 1 <= num_skipped <= 10
    assert skipped == [1] * num_skipped + [0] * (12 - num_skipped)
    assert [row["loss_scale"] for row in rows] == [2.0 ** (24 - min(n, num_skipped)) for n in range(12)]
    assert all(math.isfinite(row["grad_norm"]) != row["skipped"] for row in rows)
