"""`Trainer.evaluate`: the losses of one process, however few microbatches there are for the data ranks."""

import pytest

from tests.support import Layout, Recipe, with_dropout
from tests.trainers import CORPUS_SHAPE, evaluate

RECIPE = Recipe(shape=CORPUS_SHAPE)
# Float64 sums of some hundred losses in another order.
TOLERANCE = 1e-12
# Layout, samples in microbatches of two, and the microbatches of each data rank, of which some are empty.
CASES = [
    (Layout(data=2), 6, 2),
    (Layout(data=2, pipeline=2), 5, 2),
    (Layout(data=2, tensor=2), 3, 1),
    (Layout(data=2, pipeline=2), 2, 1),
    (Layout(data=4), 1, 1),
]


@pytest.mark.parametrize(("layout", "num_samples", "share"), CASES)
def test_ranks_with_fewer_or_no_samples_evaluate_like_one_process(ranks, data, layout, num_samples, share):
    samples = f"run.evaluation_samples={num_samples}"
    answers = ranks.run(layout.world, evaluate, data, RECIPE, layout, samples)
    ((num_microbatches, truth, counts),) = ranks.run(1, evaluate, data, RECIPE, Layout(), samples)
    assert counts.pairs == num_samples
    assert num_microbatches == -(-num_samples // 2)
    assert [answer[0] for answer in answers] == [share] * layout.world
    for _, losses, found_counts in answers:
        assert found_counts == counts
        assert losses == answers[0][1], "all ranks report the same"
        assert losses.mlm_loss == pytest.approx(truth.mlm_loss, rel=TOLERANCE)
        assert losses.nsp_loss == pytest.approx(truth.nsp_loss, rel=TOLERANCE)
        assert (losses.mlm_accuracy, losses.nsp_accuracy) == (truth.mlm_accuracy, truth.nsp_accuracy)


def test_evaluation_has_no_dropout(ranks, data):
    """Its bits depend on the sample alone, so that two evaluations would agree with dropout on, too."""
    without = Recipe(shape=with_dropout(CORPUS_SHAPE, 0.0))
    found, truth = (ranks.run(1, evaluate, data, recipe, Layout()) for recipe in (RECIPE, without))
    assert found == truth
