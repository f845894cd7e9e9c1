"""The formula of activations against what autograd really saves, storage by storage."""

from dataclasses import replace

import pytest
import torch

from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.errors import ConfigError
from megatron_bert_tp.model.memory import (
    Layout,
    deferred_bytes,
    layer_bytes,
    layer_terms,
    peak_bytes,
    stage_bytes,
    stage_terms,
)
from megatron_bert_tp.model.microbatch_sizes import Microbatch
from megatron_bert_tp.model.recompute import Recompute
from megatron_bert_tp.model.segments import Segments
from megatron_bert_tp.model.shape import ModelShape
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.pipeline.partition import StagePlan
from megatron_bert_tp.pipeline.schedule import orders_of, placement_of, programs
from megatron_bert_tp.pipeline.simulate import Durations, simulate
from tests.model.live_bytes import LiveBytes, WatchedGradients, layout_of, received_by, saved_sizes, sizes_of
from tests.model.stages import Model, Way, built, loss_of, packed
from tests.support import Layout as Mesh
from tests.support import build_mesh, make_batch, with_dropout

SHAPE = ModelShape(
    vocab_size=1003,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=192,
    max_position_embeddings=72,
    type_vocab_size=2,
)
WIDE = replace(SHAPE, hidden_size=256, num_attention_heads=8, intermediate_size=1024, max_position_embeddings=128)
# 3 x 67 positions divide by neither 2 nor 4; packed, they make groups of 67, 64 and 32.
LENGTHS = (67, 41, 25)
EVEN = (64, 64)
PLANS = {
    "all": StagePlan(True, True, range(3)),
    "first": StagePlan(True, False, range(1)),
    "middle": StagePlan(False, False, range(1, 2)),
    "last": StagePlan(False, True, range(1, 3)),
}
MODELS = {
    "dropout": Model(with_dropout(SHAPE)),
    "no dropout": Model(SHAPE),
    "only hidden": Model(replace(SHAPE, hidden_dropout_prob=0.1)),
    "only attention": Model(replace(SHAPE, attention_probs_dropout_prob=0.1)),
    "packed": Model(with_dropout(SHAPE), is_packed=True),
    "packed, no dropout": Model(SHAPE, is_packed=True),
    "decoder": Model(replace(SHAPE, is_decoder=True)),
    "relu": Model(replace(with_dropout(SHAPE), hidden_act="relu")),
    "silu": Model(replace(with_dropout(SHAPE), hidden_act="silu")),
    "gelu_new": Model(replace(with_dropout(SHAPE), hidden_act="gelu_new")),
    "wide": Model(with_dropout(WIDE)),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
KINDS = [Recompute(), Recompute("selective"), Recompute("full")]
RECOMPUTES = [*KINDS, Recompute("selective", 2), Recompute("full", 2)]


def batch_of(model: Model, lengths: tuple[int, ...] = LENGTHS) -> Batch:
    made = make_batch(lengths, shape=model.shape, first_sample=0, seed=4)
    return packed(made, lengths, padding=3) if model.is_packed else made


def both(model: Model, way: Way, axis: Axis, plan: str, lengths: tuple[int, ...] = LENGTHS) -> tuple[int, int]:
    """Bytes as measured and as computed."""
    batch = batch_of(model, lengths)
    measured = sum(saved_sizes(model, way, axis, PLANS[plan], batch))
    return measured, stage_bytes(layout_of(model, way), sizes_of(batch), PLANS[plan])


Jobs = list[tuple[Model, Way, str, tuple[int, ...]]]


def run_both(jobs: Jobs, size: int) -> list[tuple[int, int]]:
    axis = build_mesh(Mesh(tensor=size)).tensor
    return [both(model, way, axis, plan, lengths) for model, way, plan, lengths in jobs]


@pytest.mark.parametrize("name", MODELS)
def test_formula_gives_the_bytes_that_are_saved(name):
    alone = Axis.alone("tensor")
    for recompute in RECOMPUTES:
        for plan in PLANS:
            measured, computed = both(MODELS[name], Way(recompute=recompute), alone, plan)
            assert measured == computed > 0, (recompute, plan)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dropout", "no dropout", "packed, no dropout"])
def test_formula_holds_in_every_number_format(name, dtype):
    alone, model = Axis.alone("tensor"), replace(MODELS[name], dtype=dtype)
    for recompute in KINDS:
        for lengths in (LENGTHS, EVEN):
            measured, computed = both(model, Way(recompute=recompute), alone, "all", lengths)
            assert measured == computed, (recompute, lengths)


@pytest.mark.parametrize(
    ("size", "splits_sequence"),
    [(2, False), (2, True), pytest.param(4, False, marks=pytest.mark.slow), (4, True)],
)
def test_formula_holds_on_tensor_ranks(ranks, size, splits_sequence):
    ways = [Way(size, splits_sequence, recompute) for recompute in RECOMPUTES[:4]]
    names = ("dropout", "no dropout", "packed", "packed, no dropout", "wide")
    jobs: Jobs = [(MODELS[name], way, plan, LENGTHS) for name in names for way in ways for plan in PLANS]
    jobs += [(replace(MODELS["dropout"], dtype=dtype), ways[0], "all", EVEN) for dtype in DTYPES]
    for answers in ranks.run(size, run_both, jobs, size):
        for job, (measured, computed) in zip(jobs, answers, strict=True):
            assert measured == computed, job


def test_terms_of_a_layer_are_storages_of_their_own():
    """A stage of two layers keeps one storage more for each term than a stage of one."""
    model, alone = MODELS["dropout"], Axis.alone("tensor")
    batch = batch_of(model)
    one, two = (
        saved_sizes(model, Way(), alone, StagePlan(False, False, range(count)), batch) for count in (1, 2)
    )
    for size in one:
        two.remove(size)
    layout, sizes = layout_of(model, Way()), sizes_of(batch)
    statistics = [sizes.positions * layout.wide_bytes] * 2
    expected = []
    for name, size in layer_terms(layout, sizes).items():
        apart = statistics if "LayerNorm" in name else []
        expected += [size - sum(apart), *apart]
    assert two == sorted(expected)


def test_groups_of_a_packed_row_are_those_of_attention():
    lengths = (67, 41, 25, 64, 33, 32, 1)
    segments = Segments.of(lengths, is_causal=False, like=torch.empty(1, sum(lengths), 0))
    computed = Microbatch.of_packed(lengths, sum(lengths), masked=8).groups
    found = [(len(each.samples), each.length, each.mask is not None) for each in segments.groups]
    assert [(group.rows, group.length, group.is_padded) for group in computed] == found


def test_what_has_no_formula_is_refused():
    for change in ({"position_embedding_type": "relative_key"}, {"add_cross_attention": True}):
        with pytest.raises(ConfigError, match="no formula"):
            Layout(shape=replace(SHAPE, **change))


@pytest.mark.parametrize("name", ["dropout", "no dropout"])
def test_what_recomputing_saves_is_computed(name):
    """The difference of the formula's terms: selective all that lies between projections and joined heads."""
    model, alone = replace(MODELS[name], dtype=torch.float32), Axis.alone("tensor")
    layout, sizes = layout_of(model, Way()), sizes_of(batch_of(model, EVEN))
    batch, heads, sequence, hidden = 2, 4, 64, 64
    probabilities = batch * heads * sequence**2 * (4 + 1)
    # Queries, keys and values are kept either way; the heads before they are joined are not.
    joined = batch * sequence * hidden * 4
    saving = {
        "dropout": joined + probabilities,
        "no dropout": joined + batch * heads * sequence * 4,
    }[name]
    assert layer_bytes(layout, sizes) - layer_bytes(layout, sizes, "selective") == saving
    assert layer_bytes(layout, sizes, "full") == joined
    none, selective = (
        sum(saved_sizes(model, Way(recompute=kind), alone, PLANS["middle"], batch_of(model, EVEN)))
        for kind in KINDS[:2]
    )
    assert none - selective == saving


def test_layers_take_less_than_the_formula_of_the_paper():
    """Korthikanti et al. 2022, table 2, at 16 bits: ``sbh (34 + 5 a s / h)``; docs/memory.md says why."""
    shape = with_dropout(replace(WIDE, intermediate_size=4 * WIDE.hidden_size))
    batch = Microbatch.of_rows(2, 128, masked=8)
    states, heads = batch.positions * shape.hidden_size, shape.num_attention_heads
    pairs = batch.squares * heads
    statistics = 4 * batch.positions * 4
    ours = layer_bytes(Layout(shape=shape, element_bytes=2), batch)
    assert ours == 36 * states + 3 * pairs + statistics
    assert ours < 34 * states + 5 * pairs


def held_by_deferred(model: Model, way: Way, axis: Axis, plan: str) -> tuple[int, int]:
    """Bytes that wait after an input gradient, measured and computed."""
    batch = batch_of(model)
    stage = built(model, way, axis, PLANS[plan])
    live = LiveBytes(stage)
    stage.weight_gradients = WatchedGradients(live)
    stage._set_up_layers()
    output = stage(received_by(stage, batch), batch)
    result = loss_of(stage, output, batch) if PLANS[plan].is_last else output
    with stage.weight_gradients.put_off() as _works:
        result.backward(torch.ones_like(result))
    del output, result
    return live.total, deferred_bytes(layout_of(model, way), sizes_of(batch), PLANS[plan])


def run_deferred(jobs: Jobs, size: int) -> list[tuple[int, int]]:
    axis = build_mesh(Mesh(tensor=size)).tensor
    return [held_by_deferred(model, way, axis, plan) for model, way, plan, _lengths in jobs]


@pytest.mark.parametrize(("size", "splits_sequence"), [(1, False), (2, False), (2, True)])
def test_deferred_weight_gradients_hold_both_sides_of_their_products(ranks, size, splits_sequence):
    ways = [Way(size, splits_sequence, recompute) for recompute in KINDS]
    names = ("dropout", "no dropout", "packed")
    models = [*(MODELS[name] for name in names), replace(MODELS["dropout"], dtype=torch.bfloat16)]
    jobs: Jobs = [(model, way, plan, LENGTHS) for model in models for way in ways for plan in PLANS]
    for answers in ranks.run(size, run_deferred, jobs, size):
        for job, (measured, computed) in zip(jobs, answers, strict=True):
            assert measured == computed > 0, job


@pytest.mark.parametrize("microbatches", [1, 4, 8])
@pytest.mark.parametrize("name", ["1f1b", "gpipe", "interleaved", "zb-h1", "zb-v"])
def test_peak_of_a_schedule_is_that_of_its_simulation(name, microbatches):
    """Counted in microbatches: a pass saves one byte, or puts off one."""
    virtual = 2 if name in ("interleaved", "zb-v") else 1
    placement = placement_of(name, 4, virtual)
    orders = orders_of(name, placement, microbatches)
    durations = Durations.equal(placement.num_stages, forward=1, backward=2)
    timeline = simulate(programs(name, placement, microbatches), placement, durations)
    for rank, order in enumerate(orders):
        only_saved = peak_bytes(order, saved=[1] * virtual, deferred=[0] * virtual)
        only_deferred = peak_bytes(order, saved=[0] * virtual, deferred=[1] * virtual)
        assert only_saved == timeline.peak_live(rank)
        assert only_deferred == timeline.peak_deferred(rank)
        if name == "1f1b":
            assert only_saved == min(4 - rank, microbatches)


def test_stage_of_all_layers_is_the_sum_of_its_stages():
    layout = Layout(shape=with_dropout(SHAPE))
    batch = Microbatch.of_rows(2, 64, masked=64)
    whole = stage_bytes(layout, batch, PLANS["all"])
    cut = [StagePlan(True, False, range(1)), PLANS["middle"], StagePlan(False, True, range(2, 3))]
    assert whole == sum(stage_bytes(layout, batch, plan) for plan in cut)
    assert "softmax" in stage_terms(layout, batch, PLANS["last"])
