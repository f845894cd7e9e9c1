"""Every message of a step, counted on real ranks and compared with a table that gives each a reason."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist

from megatron_bert_tp.data.batches import Batch
from megatron_bert_tp.model.shape import tensor_shapes
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.objectives.pretraining import count
from megatron_bert_tp.parallel.mesh import Axis, MeshShape, ParallelMesh
from megatron_bert_tp.parallel.sharding import padded_share
from megatron_bert_tp.pipeline.partition import StagePlan, partition
from tests.support import (
    CPU,
    LENGTHS,
    ODD_SHAPE,
    Layout,
    Recipe,
    batches_of_step,
    build_gradients,
    build_mesh,
    build_stage,
    run_passes,
    share_of_replica,
    total_losses,
    with_dropout,
)

RECIPE = Recipe(shape=with_dropout(ODD_SHAPE))
ONE_BUCKET = 1 << 30
HIDDEN = RECIPE.shape.hidden_size
NAMES = list(tensor_shapes(RECIPE.shape))
AXES = ("data", "pipeline", "tensor", "tied")
OTHERS = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all", "all_to_all_single", "barrier",
    "broadcast", "broadcast_object_list", "gather", "gather_object", "monitored_barrier",
    "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send",
)  # fmt: skip
LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(tensor=4),
    Layout(pipeline=2, tensor=2, schedule="gpipe"),
    Layout(data=2, pipeline=2, tensor=2),
    Layout(data=2, pipeline=4),
]


@dataclass(frozen=True)
class Call:
    """One message: what, on which axis, in which part of the step, and how many elements."""

    function: str
    axis: str
    phase: str
    elements: int


class Recorder:
    """Stands between the package and `torch.distributed`, and writes down what passes."""

    def __init__(self, mesh: ParallelMesh) -> None:
        self.calls: list[Call] = []
        self.phase = "count"
        self._axes = {id(axis.group): axis.name for axis in (getattr(mesh, name) for name in AXES) if axis.group}

    def write(self, function: str, group: object, elements: int) -> None:
        self.calls.append(Call(function, self._axes.get(id(group), "another group"), self.phase, elements))

    @contextmanager
    def listening(self) -> Iterator[None]:
        all_reduce, exchange, backward = dist.all_reduce, dist.batch_isend_irecv, torch.autograd.backward
        others = {name: getattr(dist, name) for name in OTHERS}

        def recorded_all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
            kind = "maximum" if op == dist.ReduceOp.MAX else "sum"
            self.write(kind, group, tensor.numel())
            return all_reduce(tensor, op=op, group=group, async_op=async_op)

        def recorded_exchange(operations):
            for operation in operations:
                self.write(operation.op.__name__, operation.group, operation.tensor.numel())
            return exchange(operations)

        def marked_backward(*args, **kwargs):
            self.phase = "backward"
            backward(*args, **kwargs)
            self.phase = "forward"

        dist.all_reduce, dist.batch_isend_irecv = recorded_all_reduce, recorded_exchange
        torch.autograd.backward = marked_backward
        for name in OTHERS:
            setattr(dist, name, lambda *_args, called=name, **_kwargs: self.write(called, None, -1))
        try:
            yield
        finally:
            dist.all_reduce, dist.batch_isend_irecv = all_reduce, exchange
            torch.autograd.backward = backward
            for name, function in others.items():
                setattr(dist, name, function)


def calls_of_step(layout: Layout) -> list[Call]:
    """One step of training on this rank, from counting labels to the reported losses."""
    mesh = build_mesh(layout)
    stage = build_stage(RECIPE, mesh)
    gradients = build_gradients(stage, mesh, NAMES, bucket_bytes=ONE_BUCKET)
    batches = share_of_replica(batches_of_step(0, shape=RECIPE.shape), mesh)
    recorder = Recorder(mesh)
    with recorder.listening():
        counts = count(batches, mesh.data, CPU)
        recorder.phase = "forward"
        statistics = run_passes(stage, mesh, batches, counts, layout.schedule)
        recorder.phase = "gradients"
        gradients.clip_(gradients.reduce_and_norm(), 0.5)
        recorder.phase = "report"
        total_losses(statistics, counts, mesh)
    return recorder.calls


@dataclass(frozen=True)
class Place:
    """What the table needs to know about one rank."""

    layout: Layout
    stage: int
    replica: int
    shard: int

    @property
    def plan(self) -> StagePlan:
        return partition(RECIPE.shape.num_hidden_layers, self.layout.pipeline)[self.stage]

    @property
    def batches(self) -> list[Batch]:
        share = len(LENGTHS) // self.layout.data
        return batches_of_step(0, shape=RECIPE.shape)[self.replica * share :][:share]

    @property
    def axis(self) -> Axis:
        return Axis("tensor", tuple(range(self.layout.tensor)), self.shard)


def places(layout: Layout) -> list[Place]:
    shape = MeshShape(pipeline=layout.pipeline, data=layout.data, tensor=layout.tensor)
    return [Place(layout, *shape.place_of(rank)) for rank in range(layout.world)]


def hidden_elements(batch: Batch) -> int:
    return batch.input_ids.numel() * HIDDEN


def on_tensor_axis(place: Place) -> Iterator[tuple[Call, int]]:
    """Calls per microbatch, and how often."""
    num_layers = len(place.plan.layers)
    for batch in place.batches:
        hidden, masked = hidden_elements(batch), len(batch.masked_positions)
        # Shoeybi et al. 2019: the row-parallel products of attention and MLP ...
        yield Call("sum", "tensor", "forward", hidden), 2 * num_layers
        # ... and the inputs of their column-parallel products.
        yield Call("sum", "tensor", "backward", hidden), 2 * num_layers
        if place.plan.is_first:
            # Every rank looks up its own rows of the vocabulary.
            yield Call("sum", "tensor", "forward", hidden), 1
        if place.plan.is_last:
            # Cross entropy: largest logit, then sum of exponentials and the label's logit together.
            yield Call("maximum", "tensor", "forward", masked), 1
            yield Call("sum", "tensor", "forward", 2 * masked), 1
            # Input of the vocabulary projection, at the masked positions only.
            yield Call("sum", "tensor", "backward", masked * HIDDEN), 1
    # Squares of all tensors, for the norm.
    yield Call("sum", "tensor", "gradients", len(NAMES)), 1


def on_pipeline_axis(place: Place) -> Iterator[tuple[Call, int]]:
    for batch in place.batches:
        hidden = hidden_elements(batch)
        # Messages are launched between the passes: hidden states onward, gradients back.
        yield Call("isend", "pipeline", "forward", hidden), (not place.plan.is_last) + (not place.plan.is_first)
        yield Call("irecv", "pipeline", "forward", hidden), (not place.plan.is_first) + (not place.plan.is_last)
    yield Call("sum", "pipeline", "gradients", len(NAMES)), 1


def on_tied_axis(place: Place) -> Iterator[tuple[Call, int]]:
    if place.plan.is_first or place.plan.is_last:
        # The gradients of both uses of the word embeddings: this rank's rows.
        yield Call("sum", "tied", "gradients", padded_share(RECIPE.shape.vocab_size, place.axis) * HIDDEN), 1


def on_data_axis(place: Place) -> Iterator[tuple[Call, int]]:
    # Numbers of masked tokens and of pairs in the whole step.
    yield Call("sum", "data", "count", 2), 1
    stage = MegatronBertStage(RECIPE.shape, place.plan, axis=place.axis)
    yield Call("sum", "data", "gradients", sum(parameter.numel() for parameter in stage.parameters())), 1
    if place.plan.is_last:
        # Two losses and two numbers of hits.
        yield Call("sum", "data", "report", 4), 1


def table(place: Place) -> Counter[Call]:
    """All messages of a step; an axis of one rank sends none."""
    layout = place.layout
    rows = {
        "tensor": (on_tensor_axis, layout.tensor),
        "pipeline": (on_pipeline_axis, layout.pipeline),
        "tied": (on_tied_axis, layout.pipeline),
        "data": (on_data_axis, layout.data),
    }
    expected: Counter[Call] = Counter()
    for calls, size in rows.values():
        for call, times in calls(place) if size > 1 else ():
            expected[call] += times
    return expected


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_step_sends_what_the_table_says_and_nothing_else(ranks, layout):
    for place, calls in zip(places(layout), ranks.run(layout.world, calls_of_step, layout), strict=True):
        expected = table(place)
        found = Counter(calls)
        assert found - expected == Counter(), f"more than the table at {place}"
        assert expected - found == Counter(), f"less than the table at {place}"


@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_layer_costs_two_sums_forward_and_two_backward_per_microbatch(ranks, num_layers):
    """By difference, without the table: one layer more adds 2 + 2 sums of batch x sequence x hidden."""
    recipe_calls = [ranks.run(2, calls_of_layers, layers)[0] for layers in (num_layers, num_layers + 1)]
    more = Counter(recipe_calls[1]) - Counter(recipe_calls[0])
    expected = Counter()
    for batch in batches_of_step(0, shape=RECIPE.shape):
        for phase in ("forward", "backward"):
            expected[Call("sum", "tensor", phase, hidden_elements(batch))] += 2
    assert more == expected


def calls_of_layers(num_layers: int) -> list[Call]:
    """Passes of a model of so many layers at tensor 2."""
    mesh = build_mesh(Layout(tensor=2))
    recipe = replace(RECIPE, shape=replace(RECIPE.shape, num_hidden_layers=num_layers))
    stage = build_stage(recipe, mesh)
    batches = batches_of_step(0, shape=recipe.shape)
    recorder = Recorder(mesh)
    recorder.phase = "forward"
    with recorder.listening():
        run_passes(stage, mesh, batches, count(batches, mesh.data, CPU), "1f1b")
    return recorder.calls
