"""The curve belongs to the recipe: the trainer takes the steps of one process on every layout, with dropout on."""

from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pytest
import torch

from megatron_bert_tp.model.shape import tensor_shapes
from tests.comparison import Step, is_key_bias, join_steps, relative_errors
from tests.support import Layout, Recipe, with_dropout
from tests.trainers import CORPUS_SHAPE, train, train_on_made

RECIPE = Recipe(shape=CORPUS_SHAPE, clip_norm=0.5, final_rate=0.0)
UNTIED = replace(RECIPE, shape=replace(CORPUS_SHAPE, tie_word_embeddings=False))
DISTANCES = replace(
    RECIPE, shape=replace(CORPUS_SHAPE, position_embedding_type="relative_key", hidden_act="silu"), num_steps=2
)
# Nine words on four tensor ranks, 8 rows each: the last two hold none.
FEW_WORDS = replace(RECIPE, shape=replace(CORPUS_SHAPE, vocab_size=9))
# Sums in another order differ by some units in the last place, 1e-16 each; a thousand such sums and three
# steps stay far below this, and any missing, doubled or shifted term lies far above.
TOLERANCE = 1e-9
KEY_BIAS_GRADIENT = 1e-12

# Eight layers: enough for four ranks of two stages, or two of three.
DEEP = replace(RECIPE, shape=replace(CORPUS_SHAPE, num_hidden_layers=8))
DEEP_SINGLE = replace(DEEP, dtype=torch.float32)

LAYOUTS = [
    *(Layout(data=d, pipeline=p, tensor=t) for d, p, t in product((1, 2), repeat=3) if d * p * t > 1),
    Layout(pipeline=3),
    Layout(pipeline=4),
    Layout(tensor=4),
    Layout(pipeline=2, tensor=2, schedule="gpipe"),
]
ENGINE = [
    # Sequence parallelism; 24 tokens x 2 rows divide by 2 and 4, and packed rows by none.
    Layout(tensor=2, sequence=True),
    Layout(tensor=4, sequence=True),
    Layout(tensor=4, sequence=True, packing="packed"),
    Layout(data=2, tensor=2, sequence=True),
    Layout(pipeline=2, tensor=2, sequence=True, schedule="gpipe"),
    Layout(pipeline=2, tensor=4, sequence=True),
    # Several stages on a rank.
    Layout(pipeline=2, schedule="interleaved", virtual=2),
    Layout(pipeline=2, schedule="interleaved", virtual=3),
    Layout(pipeline=3, schedule="interleaved", virtual=2),
    Layout(pipeline=4, schedule="interleaved", virtual=2),
    Layout(schedule="interleaved", virtual=2),
    Layout(data=2, pipeline=2, schedule="interleaved", virtual=3, overlaps=True),
    Layout(data=2, pipeline=2, tensor=2, schedule="interleaved", virtual=2, shards=True),
    # Weight gradients in passes of their own.
    Layout(schedule="zb-h1"),
    Layout(pipeline=2, schedule="zb-h1"),
    Layout(pipeline=4, schedule="zb-h1", overlaps=True),
    Layout(data=2, pipeline=4, schedule="zb-h1", shards=True),
    Layout(pipeline=2, tensor=2, schedule="zb-h1", sequence=True),
    Layout(pipeline=2, schedule="zb-v", virtual=2),
    Layout(pipeline=4, schedule="zb-v", virtual=2),
    Layout(data=2, pipeline=2, tensor=2, schedule="zb-v", virtual=2, sequence=True, shards=True),
    # Rows of tensors shared out over the data ranks; 4 divides few of their heights.
    Layout(data=2, shards=True),
    Layout(data=4, shards=True),
    Layout(data=4, tensor=2, shards=True, packing="bins"),
    Layout(data=8, shards=True, packing="packed"),
    # Recomputed activations.
    Layout(recompute="full"),
    Layout(tensor=2, recompute="selective"),
    Layout(tensor=2, sequence=True, recompute="full", every=2),
    Layout(pipeline=2, schedule="zb-h1", recompute="full"),
    Layout(data=2, pipeline=2, schedule="interleaved", virtual=2, recompute="selective", every=3),
    # Packed rows, whose lengths differ between microbatches.
    Layout(packing="packed"),
    Layout(pipeline=4, schedule="zb-v", virtual=2, packing="packed", overlaps=True),
    # Everything at once.
    Layout(data=2, pipeline=2, tensor=2, schedule="interleaved", virtual=2, sequence=True, shards=True,
           overlaps=True, recompute="selective", packing="packed"),
    Layout(data=2, pipeline=2, tensor=2, schedule="zb-h1", sequence=True, shards=True, recompute="full", every=2,
           packing="packed"),
]  # fmt: skip
PIPELINES = [
    *(Layout(pipeline=p, schedule=s) for p in (2, 4) for s in ("gpipe", "1f1b", "zb-h1")),
    Layout(pipeline=2, schedule="interleaved", virtual=3),
    Layout(pipeline=4, schedule="interleaved", virtual=2, overlaps=True),
    Layout(pipeline=2, schedule="zb-v", virtual=2),
    Layout(pipeline=4, schedule="zb-v", virtual=2, recompute="full"),
    Layout(pipeline=2, schedule="zb-h1", overlaps=True, recompute="selective", every=2),
]
LONG_LAYOUTS = [
    Layout(data=d, pipeline=p, tensor=t, schedule=s)
    for d, p, t, s in product((1, 2), (1, 2, 4), (1, 2, 4), ("gpipe", "1f1b"))
    if d * p * t <= 8 and (p > 1 or s == "1f1b") and d * p * t > 1
]
LONG = {"tied": replace(RECIPE, num_steps=10), "untied": replace(UNTIED, num_steps=10)}


def name_of(layout: Layout) -> str:
    """The sizes, and what differs from a plain layout."""
    plain = Layout(data=layout.data, pipeline=layout.pipeline, tensor=layout.tensor)
    changed = {name: value for name, value in asdict(layout).items() if value != getattr(plain, name)}
    more = "".join(f"-{name}-{value}" for name, value in changed.items())
    return f"data{layout.data}-pipeline{layout.pipeline}-tensor{layout.tensor}{more}"


def steps_of(ranks, settings: Path, recipe: Recipe, layout: Layout) -> list[Step]:
    return join_steps(ranks.run(layout.world, train, settings, recipe, layout))


@pytest.fixture(scope="module")
def one_process_of(ranks, data):
    """The steps of one process for a recipe, computed once."""
    known: dict[Recipe, list[Step]] = {}

    def one_process_of(recipe: Recipe) -> list[Step]:
        if recipe not in known:
            known[recipe] = steps_of(ranks, data, recipe, Layout())
        return known[recipe]

    return one_process_of


def assert_same_tensors(found: Step, truth: Step, recipe: Recipe) -> None:
    # Adam moves by at most rate x |g| / eps where |g| is below eps; both runs may, in opposite directions.
    key_bias_weight = 2 * recipe.num_steps * recipe.rate * KEY_BIAS_GRADIENT / 1e-8
    for name in filter(is_key_bias, truth.gradients):
        assert max(step.gradients[name].abs().max() for step in (found, truth)) < KEY_BIAS_GRADIENT
        assert (found.weights[name] - truth.weights[name]).abs().max() < key_bias_weight
    for pair in ((found.gradients, truth.gradients), (found.weights, truth.weights)):
        errors = relative_errors(*pair)
        assert {name: e for name, e in errors.items() if e > TOLERANCE and not is_key_bias(name)} == {}


def assert_same_curve(found: list[Step], truth: list[Step], recipe: Recipe) -> None:
    for ours, theirs in zip(found, truth, strict=True):
        assert ours.losses.mlm_loss == pytest.approx(theirs.losses.mlm_loss, rel=TOLERANCE, abs=0)
        assert ours.losses.nsp_loss == pytest.approx(theirs.losses.nsp_loss, rel=TOLERANCE, abs=0)
        assert ours.losses.mlm_accuracy == theirs.losses.mlm_accuracy
        assert ours.losses.nsp_accuracy == theirs.losses.nsp_accuracy
        assert ours.norm == pytest.approx(theirs.norm, rel=TOLERANCE, abs=0)
        assert_same_tensors(ours, theirs, recipe)


def assert_clipped_and_moving(steps: list[Step], recipe: Recipe) -> None:
    """Guards the comparisons: every tensor is compared, has a gradient, and is clipped."""
    names = tensor_shapes(recipe.shape).keys()
    for step in steps:
        assert step.gradients.keys() == step.weights.keys() == names
        assert step.norm > recipe.clip_norm
        clipped = sum(gradient.square().sum().item() for gradient in step.gradients.values()) ** 0.5
        assert clipped == pytest.approx(recipe.clip_norm, rel=1e-9)
        assert [n for n, g in step.gradients.items() if not is_key_bias(n) and not g.abs().max() > 1e-6] == []
    assert len({step.losses.loss for step in steps}) == recipe.num_steps
    first, last = steps[0].weights, steps[-1].weights
    assert [n for n in names if torch.equal(first[n], last[n])] == []


@pytest.mark.parametrize("recipe", [RECIPE, UNTIED], ids=["tied", "untied"])
def test_one_process_takes_three_different_clipped_steps(one_process_of, recipe):
    assert_clipped_and_moving(one_process_of(recipe), recipe)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_layout_follows_one_process(ranks, data, one_process_of, layout):
    assert_same_curve(steps_of(ranks, data, RECIPE, layout), one_process_of(RECIPE), RECIPE)


@pytest.mark.parametrize("layout", [Layout(data=2, pipeline=2, tensor=2), Layout(tensor=4)], ids=name_of)
def test_layout_follows_one_process_with_untied_embeddings(ranks, data, one_process_of, layout):
    assert_same_curve(steps_of(ranks, data, UNTIED, layout), one_process_of(UNTIED), UNTIED)


@pytest.mark.parametrize("layout", [Layout(data=2, pipeline=2, tensor=2), Layout(tensor=4)], ids=name_of)
def test_layout_follows_one_process_with_relative_positions(ranks, data, one_process_of, layout):
    """Each tensor rank has the distances of its own heads to answer for; absolute positions are not trained."""
    truth = one_process_of(DISTANCES)
    assert_same_curve(steps_of(ranks, data, DISTANCES, layout), truth, DISTANCES)
    trained = truth[0].gradients
    assert all(f"bert.encoder.layer.{n}.attention.self.distance_embedding.weight" in trained for n in range(5))
    assert "bert.embeddings.position_embeddings.weight" not in trained


@pytest.mark.parametrize("layout", ENGINE, ids=name_of)
def test_engine_follows_one_process(ranks, data, one_process_of, layout):
    assert_same_curve(steps_of(ranks, data, DEEP, layout), one_process_of(DEEP), DEEP)


def test_at_least_thirty_layouts_on_up_to_eight_processes():
    names = {name_of(layout) for layout in (*LAYOUTS, *ENGINE)}
    assert len(names) == len(LAYOUTS) + len(ENGINE) >= 30
    assert max(layout.world for layout in ENGINE) == 8


@pytest.mark.parametrize("layout", PIPELINES, ids=name_of)
def test_pipeline_alone_follows_one_process_bit_for_bit(ranks, data, one_process_of, layout):
    found = steps_of(ranks, data, DEEP_SINGLE, layout)
    for ours, theirs in zip(found, one_process_of(DEEP_SINGLE), strict=True):
        assert (ours.losses, ours.norm) == (theirs.losses, theirs.norm)
        for name, truth in theirs.gradients.items():
            assert torch.equal(ours.gradients[name], truth), name
            assert torch.equal(ours.weights[name], theirs.weights[name]), name


def test_tensor_ranks_without_a_word_follow_one_process(ranks, data):
    """And microbatches of different numbers of samples, one of them without a masked token."""
    found, truth = (
        join_steps(ranks.run(layout.world, train_on_made, data, FEW_WORDS, layout))
        for layout in (Layout(tensor=4), Layout())
    )
    assert_clipped_and_moving(truth, FEW_WORDS)
    assert_same_curve(found, truth, FEW_WORDS)


def test_without_dropout_the_loss_is_another(ranks, data, one_process_of):
    without = replace(RECIPE, shape=with_dropout(CORPUS_SHAPE, 0.0), num_steps=1)
    assert steps_of(ranks, data, without, Layout())[0].losses != one_process_of(RECIPE)[0].losses


@pytest.mark.slow
@pytest.mark.parametrize("recipe", LONG.values(), ids=LONG)
@pytest.mark.parametrize("layout", LONG_LAYOUTS, ids=name_of)
def test_layout_follows_one_process_for_ten_steps(ranks, data, one_process_of, layout, recipe):
    assert_same_curve(steps_of(ranks, data, recipe, layout), one_process_of(recipe), recipe)
