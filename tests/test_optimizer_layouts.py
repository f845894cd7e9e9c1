"""LAMB and SGD in every kind of layout: float64, dropout on, tied embeddings, the steps of one process."""

from dataclasses import replace

import pytest
import torch

from tests.comparison import join_steps
from tests.support import Layout
from tests.test_layouts import RECIPE, assert_clipped_and_moving, assert_same_curve, name_of
from tests.trainers import CORPUS_SHAPE, train

DEEP = replace(RECIPE, shape=replace(CORPUS_SHAPE, num_hidden_layers=4))
WORDS = "bert.embeddings.word_embeddings.weight"
LAYOUTS = [
    Layout(tensor=4),
    Layout(tensor=2, sequence=True),
    Layout(data=4, shards=True),
    Layout(pipeline=4, schedule="zb-h1"),
    Layout(data=2, pipeline=2, tensor=2, schedule="zb-v", virtual=2, sequence=True, shards=True),
    Layout(data=2, pipeline=2, tensor=2, schedule="interleaved", virtual=2, sequence=True, shards=True,
           overlaps=True, recompute="selective", packing="packed"),
]  # fmt: skip
RULES = ["lamb", "sgd"]
# A ratio of norms moves a weight by rate x its norm; the plain gradient is smaller.
RATES = {"lamb": 1e-3, "sgd": 1e-2}


def recipe_of(rule: str):
    return replace(DEEP, rate=RATES[rule])


@pytest.fixture(scope="module")
def steps_of(ranks, data):
    """What each rank holds after each step, computed once for a rule and a layout."""
    known = {}

    def steps_of(rule: str, layout: Layout):
        if (rule, layout) not in known:
            given = (data, recipe_of(rule), layout, f"optimizer.name={rule}")
            known[rule, layout] = ranks.run(layout.world, train, *given)
        return known[rule, layout]

    return steps_of


@pytest.mark.parametrize("rule", RULES)
def test_one_process_takes_three_different_clipped_steps_of_its_own(steps_of, ranks, data, rule):
    steps = join_steps(steps_of(rule, Layout()))
    assert_clipped_and_moving(steps, recipe_of(rule))
    adamw = join_steps(ranks.run(1, train, data, recipe_of(rule), Layout()))
    assert adamw[0].losses == steps[0].losses
    assert adamw[-1].losses != steps[-1].losses


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("rule", RULES)
def test_layout_follows_one_process(steps_of, rule, layout):
    found, truth = join_steps(steps_of(rule, layout)), join_steps(steps_of(rule, Layout()))
    assert_same_curve(found, truth, recipe_of(rule))


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("rule", RULES)
def test_both_copies_of_the_tied_embeddings_stay_equal_bit_for_bit(steps_of, rule, layout):
    """The lookup and the projection each have a leaf: of one storage where one rank has both uses."""
    for records in zip(*steps_of(rule, layout), strict=True):
        copies: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for piece in (piece for record in records for piece in record.weights if piece.name == WORDS):
            copies.setdefault(piece.offsets, []).append(piece.values)
        assert [len(held) for held in copies.values()] == [2 * layout.data] * layout.tensor
        assert all(torch.equal(held[0], other) for held in copies.values() for other in held)
