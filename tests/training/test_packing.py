"""Packing changes how rows are computed and nothing that is learned: float64, dropout on, every kind of layout."""

import pytest

from tests.comparison import join_steps
from tests.support import Layout
from tests.test_layouts import RECIPE, assert_same_curve, name_of
from tests.trainers import evaluate, train

BATCH = "optimizer.global_batch=12"
WAYS = {
    "none": ("parallel.packing=none", "parallel.microbatch=3"),
    "bins": ("parallel.packing=bins", "parallel.microbatch_tokens=64"),
    "packed": ("parallel.packing=packed", "parallel.microbatch_tokens=50"),
}
LAYOUTS = [
    Layout(), Layout(data=2), Layout(pipeline=2), Layout(tensor=2), Layout(data=2, pipeline=2, schedule="gpipe")
]


@pytest.fixture(scope="module")
def unpacked(ranks, data):
    """Three steps of one process, where each sample is a row."""
    return join_steps(ranks.run(1, train, data, RECIPE, Layout(), BATCH, *WAYS["none"]))


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("packing", ["bins", "packed"])
def test_packed_steps_are_the_unpacked_ones(ranks, data, unpacked, packing, layout):
    steps = join_steps(ranks.run(layout.world, train, data, RECIPE, layout, BATCH, *WAYS[packing]))
    assert_same_curve(steps, unpacked, RECIPE)


@pytest.mark.parametrize("task", ["sop", "none"])
def test_other_pair_tasks_are_packed_alike(ranks, data, task):
    settings = (BATCH, f"objective.pairs={task}", "objective.masking.longest_span=3")
    truth = join_steps(ranks.run(1, train, data, RECIPE, Layout(), *settings, *WAYS["none"]))
    found = join_steps(ranks.run(2, train, data, RECIPE, Layout(tensor=2), *settings, *WAYS["packed"]))
    for ours, theirs in zip(found, truth, strict=True):
        assert ours.losses.loss == pytest.approx(theirs.losses.loss, rel=1e-9, abs=0)
        assert ours.norm == pytest.approx(theirs.norm, rel=1e-9, abs=0)
    assert (truth[0].losses.nsp_loss == 0) == (task == "none")


@pytest.mark.parametrize("packing", ["bins", "packed"])
def test_evaluation_is_the_same_packed_with_replicas_that_have_nothing(ranks, data, packing):
    """Five samples on four replicas: some microbatches are empty."""
    settings = ("optimizer.global_batch=12", "run.evaluation_samples=5")
    ((_, truth, counts),) = ranks.run(1, evaluate, data, RECIPE, Layout(), *settings, *WAYS["none"])
    for sizes in (Layout(data=4), Layout(data=2, pipeline=2)):
        way = (WAYS[packing][0], "parallel.microbatch_tokens=100")
        for _, found, found_counts in ranks.run(sizes.world, evaluate, data, RECIPE, sizes, *settings, *way):
            assert found_counts == counts
            assert found.mlm_loss == pytest.approx(truth.mlm_loss, rel=1e-9, abs=0)
            assert found.nsp_loss == pytest.approx(truth.nsp_loss, rel=1e-9, abs=0)
