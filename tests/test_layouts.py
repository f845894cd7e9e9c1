"""The curve belongs to the recipe: every layout takes the steps of one process, with dropout on."""

from dataclasses import replace

import pytest
import torch

from megatron_bert_tp.model.shape import tensor_shapes
from tests.comparison import Step, is_key_bias, join_steps, relative_errors
from tests.support import ODD_SHAPE, Layout, Recipe, train, with_dropout

RECIPE = Recipe(shape=with_dropout(ODD_SHAPE), clip_norm=0.5)
UNTIED = replace(RECIPE, shape=replace(RECIPE.shape, tie_word_embeddings=False))
SINGLE = replace(RECIPE, dtype=torch.float32)
# Sums in another order differ by some units in the last place, 1e-16 each; a thousand such sums and three
# steps stay far below this, and any missing, doubled or shifted term lies far above.
TOLERANCE = 1e-9
KEY_BIAS_GRADIENT = 1e-12
# Adam moves by at most rate x |g| / eps where |g| is below eps; both runs may, in opposite directions.
KEY_BIAS_WEIGHT = 2 * RECIPE.num_steps * RECIPE.rate * KEY_BIAS_GRADIENT / 1e-8

LAYOUTS = [
    *(Layout(data=d, pipeline=p, tensor=t) for d in (1, 2) for p in (1, 2) for t in (1, 2) if d * p * t > 1),
    Layout(pipeline=4),
    Layout(tensor=4),
    Layout(pipeline=2, tensor=2, schedule="gpipe"),
]
PIPELINES = [Layout(pipeline=p, schedule=s) for p in (2, 4) for s in ("gpipe", "1f1b")]


def name_of(layout: Layout) -> str:
    return f"data{layout.data}-pipeline{layout.pipeline}-tensor{layout.tensor}-{layout.schedule}"


def steps_of(ranks, recipe: Recipe, layout: Layout) -> list[Step]:
    return join_steps(ranks.run(layout.world, train, recipe, layout, list(tensor_shapes(recipe.shape))))


@pytest.fixture(scope="module")
def one_process(ranks):
    return steps_of(ranks, RECIPE, Layout())


@pytest.fixture(scope="module")
def one_process_untied(ranks):
    return steps_of(ranks, UNTIED, Layout())


@pytest.fixture(scope="module")
def one_process_single(ranks):
    return steps_of(ranks, SINGLE, Layout())


def assert_same_tensors(found: Step, truth: Step) -> None:
    for name in filter(is_key_bias, truth.gradients):
        assert max(step.gradients[name].abs().max() for step in (found, truth)) < KEY_BIAS_GRADIENT
        assert (found.weights[name] - truth.weights[name]).abs().max() < KEY_BIAS_WEIGHT
    for pair in ((found.gradients, truth.gradients), (found.weights, truth.weights)):
        errors = relative_errors(*pair)
        assert {name: e for name, e in errors.items() if e > TOLERANCE and not is_key_bias(name)} == {}


def assert_same_curve(found: list[Step], truth: list[Step]) -> None:
    for ours, theirs in zip(found, truth, strict=True):
        assert ours.losses.mlm_loss == pytest.approx(theirs.losses.mlm_loss, rel=TOLERANCE, abs=0)
        assert ours.losses.nsp_loss == pytest.approx(theirs.losses.nsp_loss, rel=TOLERANCE, abs=0)
        assert ours.losses.mlm_accuracy == theirs.losses.mlm_accuracy
        assert ours.losses.nsp_accuracy == theirs.losses.nsp_accuracy
        assert ours.norm == pytest.approx(theirs.norm, rel=TOLERANCE, abs=0)
        assert_same_tensors(ours, theirs)


def test_the_comparison_is_not_vacuous(one_process):
    """Every tensor of the model is there, moves, and clipping is active in every step."""
    assert one_process[0].gradients.keys() == one_process[0].weights.keys() == tensor_shapes(RECIPE.shape).keys()
    for step in one_process:
        assert step.norm > RECIPE.clip_norm
        assert [n for n, g in step.gradients.items() if not is_key_bias(n) and not g.abs().max() > 1e-6] == []
    assert len({step.losses.loss for step in one_process}) == RECIPE.num_steps


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_layout_follows_one_process(ranks, one_process, layout):
    assert_same_curve(steps_of(ranks, RECIPE, layout), one_process)


@pytest.mark.parametrize("layout", [Layout(data=2, pipeline=2, tensor=2), Layout(tensor=4)], ids=name_of)
def test_layout_follows_one_process_with_untied_embeddings(ranks, one_process_untied, layout):
    assert_same_curve(steps_of(ranks, UNTIED, layout), one_process_untied)


@pytest.mark.parametrize("layout", PIPELINES, ids=name_of)
def test_pipeline_alone_follows_one_process_bit_for_bit(ranks, one_process_single, layout):
    for ours, theirs in zip(steps_of(ranks, SINGLE, layout), one_process_single, strict=True):
        assert (ours.losses, ours.norm) == (theirs.losses, theirs.norm)
        for name, truth in theirs.gradients.items():
            assert torch.equal(ours.gradients[name], truth), name
            assert torch.equal(ours.weights[name], theirs.weights[name]), name


def test_dropout_is_drawn_anew_for_other_samples_and_seeds(ranks, one_process):
    other_seed = steps_of(ranks, replace(RECIPE, seed=12, num_steps=1), Layout())
    without = steps_of(ranks, replace(RECIPE, shape=ODD_SHAPE, num_steps=1), Layout())
    losses = {steps[0].losses.loss for steps in (one_process, other_seed, without)}
    assert len(losses) == 3
