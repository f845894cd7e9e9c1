"""Bytes of a training step against the formulas of the literature, which know nothing of the table.

A ring of ``n`` ranks sends ``(n - 1) / n`` of the whole from each rank for an all-gather or a reduce-scatter, and
twice that for an all-reduce, which is one of each.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from math import ceil, prod
from pathlib import Path

import pytest
import torch

from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.model.shape import tensor_shapes
from tests.parallel.places import places
from tests.parallel.recording import RECIPE, Call, Case, calls_of_step
from tests.support import Layout, Recipe

HIDDEN = RECIPE.shape.hidden_size
ITEM = 8  # the recipe computes in float64


def ring_bytes(calls: Iterable[Call], size: int) -> Fraction:
    """What one rank sends for these collectives over ``size`` ranks."""
    ways = {"sum": 2, "gather": 1, "scatter": 1}
    return sum((Fraction(ways[call.kind] * (size - 1) * call.num_bytes, size) for call in calls), Fraction())


def microbatches(data: Path, layout: Layout) -> list[Batch]:
    return next(places(data, RECIPE, layout)).batches


def bsh(data: Path, layout: Layout) -> int:
    """Batch x sequence x hidden, added over the microbatches of a replica."""
    return sum(prod(batch.input_ids.shape) * HIDDEN for batch in microbatches(data, layout))


# Tensor and sequence parallelism


def calls_of_one_layer(ranks, data: Path, layout: Layout) -> Counter[Call]:
    """What two layers send in the passes of a step and one does not."""
    found = []
    for num_layers in (1, 2):
        recipe = replace(RECIPE, shape=replace(RECIPE.shape, num_hidden_layers=num_layers))
        calls = ranks.run(layout.world, calls_of_step, data, Case(layout, recipe))[0]
        found.append(Counter(call for call in calls if call.phase in ("forward", "backward", "weights")))
    assert found[0] - found[1] == Counter(), "one layer sends what two do not"
    return found[1] - found[0]


def test_a_layer_costs_two_all_reduces_forward_and_two_backward_per_microbatch(ranks, data):
    """Shoeybi et al. 2019, section 3: four of batch x sequence x hidden."""
    layout, expected = Layout(tensor=2), Counter()
    for batch in microbatches(data, layout):
        rows, width = batch.input_ids.shape
        for phase in ("forward", "backward"):
            expected[Call("sum", "tensor", phase, rows * width * HIDDEN, "float64")] += 2
    found = calls_of_one_layer(ranks, data, layout)
    assert found == expected
    assert ring_bytes(found.elements(), 2) == 4 * 2 * Fraction(1, 2) * ITEM * bsh(data, layout)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_sequence_parallelism_costs_six_all_gathers_and_four_reduce_scatters(ranks, data, schedule):
    """Korthikanti et al. 2022, section 4.2.2: the bytes of the four all-reduces, and two all-gathers more.

    The paper says that the volume is that of tensor parallelism alone, and counts 4 + 4.  It too keeps only a
    rank's own tokens of the gathered inputs, and gathers them again for the gradients of the two column-parallel
    weights; that it does beside other products, as we do.  So 10 in the place of 8, a quarter more in bytes.
    A zero-bubble schedule sends the same, the two later.
    """
    layout = Layout(tensor=2, sequence=True, schedule=schedule)
    found = calls_of_one_layer(ranks, data, layout)
    kinds = Counter()
    for call, times in found.items():
        kinds[call.kind, call.phase] += times
    num = len(microbatches(data, layout))
    inputs = "weights" if schedule == "zb-h1" else "backward"
    expected = Counter({("gather", "forward"): 2 * num, ("scatter", "forward"): 2 * num})
    expected += Counter({("gather", "backward"): 2 * num, ("scatter", "backward"): 2 * num})
    expected[("gather", inputs)] += 2 * num
    assert kinds == expected
    # These microbatches divide by 2; others are rounded up to whole tokens of each rank.
    assert all(batch.input_ids.numel() % 2 == 0 for batch in microbatches(data, layout))
    of_all_reduces = 4 * 2 * Fraction(1, 2) * ITEM * bsh(data, layout)
    assert ring_bytes(found.elements(), 2) == Fraction(10, 8) * of_all_reduces


# The data axis


def bytes_of_gradients(ranks, data: Path, layout: Layout, recipe: Recipe) -> Fraction:
    """Ring bytes of one data rank for gradients and parameters; the vectors of norm and counts are left out."""
    calls = ranks.run(layout.world, calls_of_step, data, Case(layout, recipe))[0]
    of_data = [call for call in calls if call.axis == "data"]
    if layout.shards:
        chosen = [call for call in of_data if call.kind != "sum"]
        assert {call.kind for call in chosen} == {"scatter", "gather"}
    else:
        chosen = [call for call in of_data if call.phase in ("backward", "gradients")]
        assert {call.kind for call in chosen} == {"sum"}
    return ring_bytes(chosen, layout.data)


def test_a_sharded_optimizer_sends_as_much_as_an_all_reduce(ranks, data):
    """Rajbhandari et al. 2020, section 7.2.1: a reduce-scatter and an all-gather are one all-reduce.

    Exactly so where the rows of all tensors divide by the ranks, as with a vocabulary of 100 over 2.
    """
    recipe = replace(RECIPE, shape=replace(RECIPE.shape, vocab_size=100))
    num_parameters = sum(map(prod, tensor_shapes(recipe.shape).values()))
    summed = bytes_of_gradients(ranks, data, Layout(data=2), recipe)
    sharded = bytes_of_gradients(ranks, data, Layout(data=2, shards=True), recipe)
    assert summed == sharded == 2 * Fraction(1, 2) * ITEM * num_parameters


def test_rows_that_do_not_divide_are_padded_and_nothing_else(ranks, data):
    """Every tensor takes ``d * ceil(n / d)`` rows, so that one even message serves a whole bucket."""
    layout, shapes = Layout(data=4, shards=True), tensor_shapes(RECIPE.shape).values()
    num_parameters = sum(map(prod, shapes))
    missing = sum((4 * ceil(shape[0] / 4) - shape[0]) * prod(shape[1:]) for shape in shapes)
    assert missing > 0
    found = bytes_of_gradients(ranks, data, layout, RECIPE)
    assert found == 2 * Fraction(3, 4) * ITEM * (num_parameters + missing)


def test_in_bfloat16_parameters_cross_with_half_the_bytes_of_gradients(ranks, data):
    """The formula has one number format.  Gradients are added up in 4 bytes, parameters have 2: 6 instead of 8."""
    narrow = replace(RECIPE, shape=replace(RECIPE.shape, vocab_size=100), dtype=torch.bfloat16)
    num_parameters = sum(map(prod, tensor_shapes(narrow.shape).values()))
    assert bytes_of_gradients(ranks, data, Layout(data=2), narrow) == 2 * Fraction(1, 2) * 4 * num_parameters
    sharded = bytes_of_gradients(ranks, data, Layout(data=2, shards=True), narrow)
    assert sharded == Fraction(1, 2) * (4 + 2) * num_parameters


# The pipeline


@pytest.mark.parametrize(
    ("layout", "num_boundaries"),
    [
        (Layout(pipeline=2), 1),
        (Layout(pipeline=4, schedule="gpipe"), 3),
        (Layout(pipeline=4, schedule="zb-h1"), 3),
        # Narayanan et al. 2021 say v times as much; exactly it is v p - 1 boundaries for p - 1, since the way back
        # from the last rank to the first is one too.
        (Layout(pipeline=2, schedule="interleaved", virtual=2), 3),
        # Twice as much: the turn of the V stays on its rank.
        (Layout(pipeline=2, schedule="zb-v", virtual=2), 2),
    ],
    ids=str,
)
def test_each_boundary_costs_the_hidden_states_and_their_gradients(ranks, data, layout, num_boundaries):
    answers = ranks.run(layout.world, calls_of_step, data, Case(layout))
    sent = sum(call.num_bytes for calls in answers for call in calls if call.kind == "isend")
    received = sum(call.num_bytes for calls in answers for call in calls if call.kind == "irecv")
    assert sent == received == 2 * num_boundaries * ITEM * bsh(data, layout)


def test_only_a_split_sequence_keeps_tensor_ranks_from_sending_the_same(ranks, data):
    """Megatron-LM sends 1 / t from each tensor rank and gathers; here that is so with sequence parallelism."""
    for splits in (False, True):
        layout = Layout(pipeline=2, tensor=2, sequence=splits)
        answers = ranks.run(layout.world, calls_of_step, data, Case(layout))
        sent = [sum(call.num_bytes for call in calls if call.kind == "isend") for calls in answers]
        assert sent == [ITEM * bsh(data, layout) // (2 if splits else 1)] * 4
