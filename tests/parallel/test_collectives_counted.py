"""Every message of `Trainer.train_step`, counted on real ranks and compared with a table of reasons."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.model.shape import ModelShape, tensor_shapes
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.parallel.gradients import Gradients
from megatron_bert_tp.parallel.mesh import Axis, MeshShape, ParallelMesh
from megatron_bert_tp.parallel.sharding import padded_share
from megatron_bert_tp.pipeline.executor import Executor
from megatron_bert_tp.pipeline.partition import StagePlan
from megatron_bert_tp.training.build import model_shape, stage_plans
from megatron_bert_tp.training.texts import open_texts
from tests.support import Layout, Recipe
from tests.trainers import CORPUS_SHAPE, configure, trainer_of

RECIPE = Recipe(shape=CORPUS_SHAPE, clip_norm=0.5)
HIDDEN = RECIPE.shape.hidden_size
NUM_TENSORS = len(tensor_shapes(RECIPE.shape))
# Two losses, two numbers of hits, and the tokens.
NUM_STATISTICS = 6
AXES = ("data", "pipeline", "tensor", "tied", "upstream")
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
        run, reduce_and_norm = Executor.run, Gradients.reduce_and_norm
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

        def marked_run(*args, **kwargs):
            self.phase = "forward"
            statistics = run(*args, **kwargs)
            self.phase = "report"
            return statistics

        def marked_norm(*args, **kwargs):
            self.phase = "gradients"
            norm = reduce_and_norm(*args, **kwargs)
            self.phase = "update"
            return norm

        dist.all_reduce, dist.batch_isend_irecv = recorded_all_reduce, recorded_exchange
        torch.autograd.backward = marked_backward
        Executor.run, Gradients.reduce_and_norm = marked_run, marked_norm
        for name in OTHERS:
            setattr(dist, name, lambda *_args, called=name, **_kwargs: self.write(called, None, -1))
        try:
            yield
        finally:
            dist.all_reduce, dist.batch_isend_irecv = all_reduce, exchange
            torch.autograd.backward = backward
            Executor.run, Gradients.reduce_and_norm = run, reduce_and_norm
            for name, function in others.items():
                setattr(dist, name, function)


def calls_of_step(settings: Path, recipe: Recipe, layout: Layout) -> list[Call]:
    """The second step of training on this rank, as the trainer takes it."""
    trainer = trainer_of(configure(settings, recipe, layout), layout)
    trainer.train_step()
    recorder = Recorder(trainer.mesh)
    with recorder.listening():
        trainer.train_step()
    return recorder.calls


@dataclass(frozen=True)
class Place:
    """What the table needs to know about one rank."""

    layout: Layout
    shape: ModelShape
    plan: StagePlan
    shard: int
    batches: list[Batch]

    @property
    def axis(self) -> Axis:
        return Axis("tensor", tuple(range(self.layout.tensor)), self.shard)


def places(settings: Path, layout: Layout) -> Iterator[Place]:
    """All ranks, each with the microbatches of the second step of its replica."""
    config = configure(settings, RECIPE, layout)
    sizes = MeshShape(pipeline=layout.pipeline, data=layout.data, tensor=layout.tensor)
    for rank in range(layout.world):
        stage, replica, shard = sizes.place_of(rank)
        texts = open_texts(config, Axis("data", tuple(range(layout.data)), replica), say=print)
        batches = texts.training.take(config.optimizer.global_batch)
        yield Place(layout, model_shape(config), stage_plans(config)[stage], shard, batches)


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
    yield Call("sum", "tensor", "gradients", NUM_TENSORS), 1


def on_pipeline_axis(place: Place) -> Iterator[tuple[Call, int]]:
    for batch in place.batches:
        hidden = hidden_elements(batch)
        # Messages are launched between the passes: hidden states onward, gradients back.
        yield Call("isend", "pipeline", "forward", hidden), (not place.plan.is_last) + (not place.plan.is_first)
        yield Call("irecv", "pipeline", "forward", hidden), (not place.plan.is_first) + (not place.plan.is_last)
    yield Call("sum", "pipeline", "gradients", NUM_TENSORS), 1
    # The last stage alone knows the losses.
    yield Call("sum", "pipeline", "report", NUM_STATISTICS), 1


def on_tied_axis(place: Place) -> Iterator[tuple[Call, int]]:
    if place.plan.is_first or place.plan.is_last:
        # The gradients of both uses of the word embeddings: this rank's rows.
        yield Call("sum", "tied", "gradients", padded_share(place.shape.vocab_size, place.axis) * HIDDEN), 1


def on_data_axis(place: Place) -> Iterator[tuple[Call, int]]:
    # Numbers of masked tokens and of pairs in the whole step.
    yield Call("sum", "data", "count", 2), 1
    # One bucket holds all gradients of so small a model.
    stage = MegatronBertStage(place.shape, place.plan, axis=place.axis)
    yield Call("sum", "data", "gradients", sum(parameter.numel() for parameter in stage.parameters())), 1
    yield Call("sum", "data", "report", NUM_STATISTICS), 1


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


def name_of(layout: Layout) -> str:
    return f"data{layout.data}-pipeline{layout.pipeline}-tensor{layout.tensor}-{layout.schedule}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_a_step_sends_what_the_table_says_and_nothing_else(ranks, data, layout):
    answers = ranks.run(layout.world, calls_of_step, data, RECIPE, layout)
    for place, calls in zip(places(data, layout), answers, strict=True):
        assert len(place.batches) == 4 // layout.data
        expected = table(place)
        found = Counter(calls)
        assert found - expected == Counter(), f"more than the table at {place}"
        assert expected - found == Counter(), f"less than the table at {place}"


def test_a_layer_costs_two_sums_forward_and_two_backward_per_microbatch(ranks, data):
    """By difference, without the table: one layer more adds 2 + 2 sums of batch x sequence x hidden."""
    layout, found = Layout(tensor=2), []
    for num_layers in (1, 2):
        recipe = replace(RECIPE, shape=replace(RECIPE.shape, num_hidden_layers=num_layers))
        calls = ranks.run(layout.world, calls_of_step, data, recipe, layout)[0]
        found.append(Counter(call for call in calls if call.phase in ("forward", "backward")))
    expected = Counter()
    for batch in next(places(data, layout)).batches:
        for phase in ("forward", "backward"):
            expected[Call("sum", "tensor", phase, hidden_elements(batch))] += 2
    assert found[1] - found[0] == expected
    assert found[0] - found[1] == Counter()
