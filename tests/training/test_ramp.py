"""Rates by samples, growing batches and growing decay: the steps of real runs beside hand calculation."""

from dataclasses import replace

import pytest

from tests.comparison import join_steps
from tests.support import Layout, Recipe
from tests.test_layouts import assert_same_curve
from tests.trainers import CORPUS_SHAPE, run, train
from tests.training.runs import records, without_times

SHAPE = replace(CORPUS_SHAPE, num_hidden_layers=2)
RECIPE = Recipe(shape=SHAPE, num_steps=8, rate=1e-3, final_rate=0.0, clip_norm=0.5)
RAMP = (
    "optimizer.global_batch=12", "optimizer.batch_ramp.start=4", "optimizer.batch_ramp.increment=4",
    "optimizer.batch_ramp.samples=16", "optimizer.schedule_unit=samples", "optimizer.warmup_samples=8",
    "optimizer.weight_decay=0.01", "optimizer.final_weight_decay=0.1",
    "optimizer.weight_decay_ramp=linear", "run.evaluation_samples=0",
)  # fmt: skip
PACKED = ("parallel.packing=packed", "parallel.microbatch_tokens=64")
# Two increments within 16 samples, so 4 up to sample 8, 8 up to sample 16, and 12 from there on.
DONE = [4, 8, 16, 28, 40, 52, 64, 76]
BEFORE = [0, *DONE[:-1]]
# Warm-up over 8 samples counts the step's own, decay over the other 68 does not.
SHARES = [4 / 8, 8 / 8, 68 / 68, 60 / 68, 48 / 68, 36 / 68, 24 / 68, 12 / 68]


@pytest.fixture(scope="module")
def ramped(ranks, data, tmp_path_factory):
    """Folder of a run on two replicas with packed rows, saved every second step."""
    folder = tmp_path_factory.mktemp("ramped")
    given = (f"run.directory={folder}", *RAMP, *PACKED, "run.save_every=2", "run.keep_last=9")
    ranks.run(2, run, data, RECIPE, Layout(data=2), *given)
    return folder


def test_samples_rates_and_decay_are_those_of_hand_calculation(ramped):
    rows = records(ramped, "step")
    assert [row["samples"] for row in rows] == DONE
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3 * share for share in SHARES], rel=1e-12)
    decays = [0.01 + 0.09 * before / 76 for before in BEFORE]
    assert [row["weight_decay"] for row in rows] == pytest.approx(decays, rel=1e-12)


def test_the_time_left_goes_by_steps(ramped):
    rows = records(ramped, "step")
    assert rows[0]["seconds_left"] == pytest.approx(7 * rows[0]["seconds"])
    assert rows[-1]["seconds_left"] == 0


def test_replicas_with_packed_rows_follow_one_process_along_the_ramp(ranks, data):
    recipe = replace(RECIPE, num_steps=5)
    truth = join_steps(ranks.run(1, train, data, recipe, Layout(), *RAMP))
    for layout, way in ((Layout(data=2), PACKED), (Layout(data=2, shards=True), ())):
        found = join_steps(ranks.run(2, train, data, recipe, layout, *RAMP, *way))
        assert_same_curve(found, truth, recipe)


@pytest.mark.parametrize("step", [2, 4], ids=["inside the ramp", "after it"])
def test_a_run_that_goes_on_in_the_middle_of_the_ramp_takes_the_same_samples(ranks, data, ramped, tmp_path, step):
    middle = ramped / "checkpoints" / f"step_{step:08d}"
    given = (f"run.directory={tmp_path}", f"run.resume={middle}", *RAMP, *PACKED)
    ranks.run(2, run, data, RECIPE, Layout(data=2), *given)
    # Losses, norms and numbers of tokens too: other samples would give others.
    assert without_times(records(tmp_path, "step")) == without_times(records(ramped, "step"))[step:]


def test_a_constant_batch_gives_the_same_rates_by_samples_and_by_steps(ranks, data, tmp_path):
    ways = {
        "steps": ("optimizer.schedule=cosine", "optimizer.decay_steps=3"),
        "samples": ("optimizer.schedule=cosine", "optimizer.decay_samples=24", "optimizer.schedule_unit=samples"),
    }
    for name, way in ways.items():
        quiet = (f"run.directory={tmp_path}/{name}", "run.evaluation_samples=0")
        ranks.run(1, run, data, replace(RECIPE, num_steps=6, final_rate=1e-4), Layout(), *quiet, *way)
    by_steps, by_samples = (records(tmp_path / name, "step") for name in ways)
    assert without_times(by_steps) == without_times(by_samples)
    # Half a cosine from 1e-3 to 1e-4 over three steps, and what it has come to.
    expected = [1e-3, 1e-4 + 9e-4 * 0.75, 1e-4 + 9e-4 * 0.25, 1e-4, 1e-4, 1e-4]
    assert [row["learning_rate"] for row in by_steps] == pytest.approx(expected, rel=1e-12)
