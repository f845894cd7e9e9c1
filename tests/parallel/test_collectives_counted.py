"""Every message of `Trainer.train_step`, counted on real ranks and compared with a table of reasons."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from megatron_bert_tp.model.shape import tensor_shapes
from tests.parallel.message_table import table
from tests.parallel.places import buckets, places
from tests.parallel.recording import RECIPE, Case, calls_of_step
from tests.support import Layout
from tests.trainers import CORPUS_SHAPE

NARROW = replace(RECIPE, dtype=torch.bfloat16)
# Two buckets or more on a rank that has all layers.
WIDE = replace(RECIPE, shape=replace(CORPUS_SHAPE, hidden_size=64, intermediate_size=256))


LAMB = ("optimizer.name=lamb",)
CASES = {
    "one process": Case(Layout()),
    "tensor 2": Case(Layout(tensor=2)),
    "tensor 4": Case(Layout(tensor=4)),
    "gpipe, tensor 2": Case(Layout(pipeline=2, tensor=2, schedule="gpipe")),
    "all axes": Case(Layout(data=2, pipeline=2, tensor=2)),
    "data 2, pipeline 4": Case(Layout(data=2, pipeline=4)),
    "sequence": Case(Layout(tensor=2, sequence=True)),
    "sequence, packed": Case(Layout(tensor=2, sequence=True, packing="packed")),
    "sequence over 4, packed": Case(Layout(tensor=4, sequence=True, packing="packed")),
    "sequence, pipeline": Case(Layout(pipeline=2, tensor=2, sequence=True, overlaps=True)),
    "data 2, buckets": Case(Layout(data=2), WIDE),
    "shards 2": Case(Layout(data=2, shards=True)),
    "shards 2, buckets": Case(Layout(data=2, shards=True), WIDE),
    "shards 4": Case(Layout(data=4, shards=True)),
    "shards 2, tied": Case(Layout(data=2, pipeline=2, tensor=2, shards=True)),
    "lamb": Case(Layout(data=2, tensor=2), overrides=LAMB),
    "lamb, shards": Case(Layout(data=2, tensor=2, sequence=True, shards=True), overrides=LAMB),
    "interleaved": Case(Layout(pipeline=2, schedule="interleaved", virtual=2)),
    "interleaved, alone": Case(Layout(schedule="interleaved", virtual=2)),
    "zb-h1": Case(Layout(pipeline=4, schedule="zb-h1")),
    "zb-h1, buckets": Case(Layout(data=2, schedule="zb-h1"), WIDE),
    "zb-h1, sequence": Case(Layout(pipeline=2, tensor=2, schedule="zb-h1", sequence=True)),
    "zb-v": Case(Layout(pipeline=2, schedule="zb-v", virtual=2)),
    "zb-v, shards": Case(Layout(data=2, pipeline=2, schedule="zb-v", virtual=2, shards=True)),
    "full": Case(Layout(tensor=2, recompute="full")),
    "full in every second layer": Case(Layout(tensor=2, sequence=True, recompute="full", every=2)),
    "selective": Case(Layout(tensor=2, recompute="selective")),
    "selective, sequence": Case(Layout(tensor=2, sequence=True, recompute="selective")),
    "bfloat16": Case(Layout(data=2, tensor=2), NARROW),
    "bfloat16, pipeline": Case(Layout(pipeline=2, schedule="interleaved", virtual=2), NARROW),
    "bfloat16, shards": Case(Layout(data=2, tensor=2, sequence=True, shards=True), NARROW),
    "everything": Case(
        Layout(data=2, pipeline=2, tensor=2, schedule="interleaved", virtual=2, sequence=True, shards=True,
               overlaps=True, recompute="selective", packing="packed"),
    ),
    "everything in 16 bits": Case(
        Layout(data=2, pipeline=2, tensor=2, schedule="zb-v", virtual=2, sequence=True, shards=True,
               recompute="full", every=2, packing="packed"),
        NARROW,
        LAMB,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_step_sends_what_the_table_says_and_nothing_else(ranks, data, name):
    case = CASES[name]
    answers = ranks.run(case.layout.world, calls_of_step, data, case)
    for place, calls in zip(places(data, case.recipe, case.layout, *case.overrides), answers, strict=True):
        assert len(place.batches) == 4 // case.layout.data or case.layout.packing == "packed"
        expected, found = table(place), Counter(calls)
        assert found - expected == Counter(), f"more than the table on rank {place.rank}"
        assert expected - found == Counter(), f"less than the table on rank {place.rank}"


def test_the_wide_model_has_several_buckets_to_send_during_the_backward(data):
    for name in ("data 2, buckets", "shards 2, buckets", "zb-h1, buckets"):
        case = CASES[name]
        kinds = [bucket.kind for bucket in buckets(next(places(data, case.recipe, case.layout)))]
        assert kinds == ["early", "early", "tied"] or kinds.count("early") > 2


def test_other_axes_come_before_the_data_axis(ranks, data):
    """Tied copies are added before their rows are shared out: the owners of a row then have the same sum.

    So are the terms of tensor ranks: added after the reduce-scatter they would be as many messages more.
    """
    case = Case(Layout(data=2, pipeline=2, tensor=2, sequence=True, shards=True))
    answers = ranks.run(case.layout.world, calls_of_step, data, case)
    for place, calls in zip(places(data, case.recipe, case.layout), answers, strict=True):
        late = [(call.axis, call.elements) for call in calls if call.phase == "gradients"]
        of_kind = {bucket.kind: bucket.elements for bucket in buckets(place)}
        expected = [(axis, of_kind["tied"]) for axis in ("tied", "data")]
        expected += [(axis, of_kind["late"]) for axis in ("tensor", "data")]
        num_tensors = len(tensor_shapes(place.shape))
        assert late == [*expected, *((axis, num_tensors) for axis in ("tensor", "pipeline", "data"))]
