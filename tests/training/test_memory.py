"""What ranks hold while a pipeline runs, and what weights, gradients and optimizers take, against formulas."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.model.memory import Layout as Setting
from megatron_bert_tp.model.memory import deferred_bytes, peak_bytes, stage_bytes
from megatron_bert_tp.model.recompute import Recompute
from megatron_bert_tp.model.shape import ModelShape
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.model.static_memory import (
    gradient_bytes,
    optimizer_bytes,
    parameter_bytes,
    stage_tensors,
)
from megatron_bert_tp.objectives.pretraining import count, microbatch_loss
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.parallel.mesh import ParallelMesh
from megatron_bert_tp.parallel.ownership import is_master
from megatron_bert_tp.pipeline.executor import Executor
from megatron_bert_tp.pipeline.instructions import Await, Compute, Instruction, Launch, Phase, Transfer
from megatron_bert_tp.pipeline.partition import StagePlan, partition
from megatron_bert_tp.pipeline.schedule import orders_of, placement_of, programs
from megatron_bert_tp.training.build import build_pretrainer
from megatron_bert_tp.training.recipe import stage_plans
from tests.model.live_bytes import LiveBytes, WatchedGradients, sizes_of, watched
from tests.support import CPU, TIMEOUT, Layout, Recipe, build_mesh, make_batch, with_dropout
from tests.trainers import MadeBatches, configure

SHAPE = with_dropout(
    ModelShape(
        vocab_size=1003,
        hidden_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
        type_vocab_size=2,
    )
)
PIPELINES = [
    Layout(pipeline=4, schedule="1f1b"),
    Layout(pipeline=4, schedule="1f1b", recompute="selective"),
    Layout(pipeline=2, schedule="1f1b", recompute="full"),
    Layout(pipeline=2, tensor=2, schedule="1f1b", sequence=True),
    Layout(pipeline=4, schedule="gpipe"),
    Layout(pipeline=2, schedule="interleaved", virtual=2),
    Layout(pipeline=4, schedule="zb-h1"),
    Layout(pipeline=2, schedule="zb-v", virtual=2),
    Layout(pipeline=2, schedule="1f1b", overlaps=True),
]
NUM_MICROBATCHES = 6


def name_of(layout: Layout) -> str:
    kinds = f"{layout.schedule}-{layout.pipeline}x{layout.virtual}-tensor{layout.tensor}-{layout.recompute}"
    return kinds + "-overlaps" * layout.overlaps + "-shards" * layout.shards + f"-data{layout.data}"


def equal_batches() -> list[Batch]:
    """Microbatches of one size, each in storages of its own."""
    return [
        make_batch((64, 50), shape=SHAPE, first_sample=0, seed=9) for _number in range(NUM_MICROBATCHES)
    ]


# Activations


@dataclass
class Messages:
    """Buffers of the messages of one rank, and after which instruction each was given back."""

    alive: dict[tuple[str, Transfer], StorageWeakRef] = field(default_factory=dict)
    freed: dict[tuple[str, Transfer], Instruction] = field(default_factory=dict)
    _started: list[tuple[str, StorageWeakRef]] = field(default_factory=list)

    def noting(self, role: str, start: Callable[..., Any]) -> Callable[..., Any]:
        def started(buffer: Tensor, *arguments: Any) -> Any:
            self._started.append((role, StorageWeakRef(buffer.untyped_storage())))
            return start(buffer, *arguments)

        return started

    def after(self, instruction: Instruction) -> None:
        if isinstance(instruction, Launch) and self._started:  # the executor looks the program over first
            for (role, buffer), transfer in zip(self._started, instruction.transfers, strict=True):
                self.alive[role, transfer] = buffer
            self._started.clear()
        for key in [key for key, buffer in self.alive.items() if buffer.expired()]:
            del self.alive[key]
            self.freed[key] = instruction


@dataclass(frozen=True)
class Found:
    """What a run of a pipeline held on one rank, at most and at its end, and the messages that it kept."""

    peak: int
    left: int
    freed: dict[tuple[str, Transfer], Instruction]
    kept: list[tuple[str, Transfer]]


def stages_of(layout: Layout, mesh: ParallelMesh, live: LiveBytes) -> list[MegatronBertStage]:
    """The stages of this rank, whose deferred work is watched."""
    placement = placement_of(layout.schedule, layout.pipeline, layout.virtual)
    stages = [
        MegatronBertStage(
            SHAPE,
            plans_of(layout)[stage],
            axis=mesh.tensor,
            dtype=torch.float32,
            splits_sequence=layout.sequence,
            recompute=Recompute(layout.recompute, layout.every),
        )
        for stage in placement.stages[mesh.pipeline.rank]
    ]
    for stage in stages:
        stage.weight_gradients = WatchedGradients(live)
        stage._set_up_layers()
        live.leave_out(stage)
    return stages


def plans_of(layout: Layout) -> tuple[StagePlan, ...]:
    return partition(SHAPE.num_hidden_layers, layout.pipeline * layout.virtual)


def run_watched(layout: Layout) -> Found:
    """Bytes that this rank holds after each instruction of a whole program."""
    mesh, live, messages = build_mesh(layout), LiveBytes(), Messages()
    stages = stages_of(layout, mesh, live)
    batches = equal_batches()
    counts = count(batches, mesh.data, CPU)
    placement = placement_of(layout.schedule, layout.pipeline, layout.virtual)
    program = programs(layout.schedule, placement, len(batches), overlaps=layout.overlaps)[mesh.pipeline.rank]
    totals = []

    def after(instruction: Instruction) -> None:
        totals.append(live.total)
        messages.after(instruction)

    def criterion(output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return microbatch_loss(output, batch, counts, num_classes=SHAPE.vocab_size, tensor=mesh.tensor)

    executor = Executor[Batch](
        stages, criterion, placement=placement, axis=mesh.pipeline, channels=mesh.channels, device=CPU
    )
    with ExitStack() as stack:
        stack.enter_context(live.watching())
        for role in ("isend", "irecv"):
            stack.enter_context(patch.object(dist, role, messages.noting(role, getattr(dist, role))))
        executor.run(watched(program, after), batches)
    return Found(max(totals), totals[-1], messages.freed, list(messages.alive))


def setting_of(layout: Layout) -> Setting:
    return Setting(
        shape=SHAPE,
        element_bytes=4,
        tensor=layout.tensor,
        splits_sequence=layout.sequence,
        recompute=Recompute(layout.recompute, layout.every),
    )


def computed_peaks(layout: Layout) -> list[int]:
    """The formula's peak of every rank of the pipeline."""
    placement = placement_of(layout.schedule, layout.pipeline, layout.virtual)
    setting, sizes = setting_of(layout), sizes_of(equal_batches()[0])
    peaks = []
    orders = orders_of(layout.schedule, placement, NUM_MICROBATCHES)
    for order, stages in zip(orders, placement.stages, strict=True):
        plans = [plans_of(layout)[stage] for stage in stages]
        peaks.append(
            peak_bytes(
                order,
                saved=[stage_bytes(setting, sizes, plan) for plan in plans],
                deferred=[deferred_bytes(setting, sizes, plan) for plan in plans],
            )
        )
    return peaks


@pytest.fixture(scope="module")
def found(ranks) -> dict[Layout, list[Found]]:
    return {layout: ranks.run(layout.world, run_watched, layout) for layout in PIPELINES}


@pytest.mark.parametrize("layout", PIPELINES, ids=name_of)
def test_peak_of_a_rank_is_that_of_the_formula(found, layout):
    computed = [peak for peak in computed_peaks(layout) for _rank in range(layout.tensor)]
    for each, peak in zip(found[layout], computed, strict=True):
        assert each.peak == peak
        assert each.left == 0


def test_a_stage_of_1f1b_holds_as_many_microbatches_as_stages_are_left(found):
    sizes = sizes_of(equal_batches()[0])
    for schedule, alive in (("1f1b", (4, 3, 2, 1)), ("gpipe", (NUM_MICROBATCHES,) * 4)):
        layout = Layout(pipeline=4, schedule=schedule)
        one = [stage_bytes(setting_of(layout), sizes, plan) for plan in plans_of(layout)]
        measured = [each.peak for each in found[layout]]
        assert measured == [num * size for num, size in zip(alive, one, strict=True)]


def last_use(role: str, transfer: Transfer, program: Iterable[Instruction]) -> Instruction:
    """After a send its `Await`; of what was received, the backward that it leads to or begins."""
    if role == "isend":
        return next(i for i in program if isinstance(i, Await) and transfer in i.transfers)
    place = transfer.microbatch, transfer.chunk
    return next(
        i
        for i in program
        if isinstance(i, Compute)
        and i.phase in (Phase.BACKWARD, Phase.INPUT_GRADIENT)
        and (i.microbatch, i.chunk) == place
    )


@pytest.mark.parametrize("layout", PIPELINES, ids=name_of)
def test_a_message_is_given_back_after_its_last_use(found, layout):
    """A stage keeps no output that it has sent, and no gradient that it has used."""
    placement = placement_of(layout.schedule, layout.pipeline, layout.virtual)
    all_programs = programs(layout.schedule, placement, NUM_MICROBATCHES, overlaps=layout.overlaps)
    for rank, each in enumerate(found[layout]):
        program = all_programs[rank // layout.tensor]
        assert each.kept == []
        assert {role for role, _transfer in each.freed} == {"isend", "irecv"}
        for (role, transfer), instruction in each.freed.items():
            assert instruction == last_use(role, transfer, program), (role, transfer)


# Weights, gradients, optimizer

RECIPES = {dtype: Recipe(shape=SHAPE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
MESHES = [
    Layout(),
    Layout(data=2),
    Layout(data=2, shards=True),
    Layout(data=4, shards=True),
    Layout(data=2, pipeline=2, shards=True),
    Layout(data=2, tensor=2, shards=True),
]


@dataclass(frozen=True)
class Static:
    """Bytes of one rank."""

    parameters: int
    gradients: int
    optimizer: int


def bytes_of(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def measure_static(settings: Path, layout: Layout) -> dict[torch.dtype, Static]:
    return {dtype: _measured(settings, recipe, layout) for dtype, recipe in RECIPES.items()}


def _measured(settings: Path, recipe: Recipe, layout: Layout) -> Static:
    config = configure(settings, recipe, layout, "optimizer.global_batch=8", "parallel.microbatch=1")
    texts = SimpleNamespace(training=MadeBatches(recipe.shape), validation=None)
    mesh, agreement = build_mesh(layout), Agreement.of_world(TIMEOUT)
    trainer = build_pretrainer(config, mesh, texts, agreement=agreement, device=CPU)
    gradients, updater = trainer.updater.gradients, trainer.updater
    states = [tensor for state in updater.optimizer.state.values() for tensor in state.values()]
    masters = [each.weight for each in updater.weights.owned if is_master(each)]
    return Static(
        parameters=bytes_of(p for stage in trainer.chunks for p in stage.parameters()),
        gradients=bytes_of(
            [
                *(sums.flat for sums in (*gradients.buckets, *gradients._apart)),
                *(bucket.own for bucket in gradients.buckets),
            ]
        ),
        optimizer=bytes_of([*states, *masters]),
    )


def computed(settings: Path, layout: Layout, dtype: torch.dtype, rank: int) -> Static:
    """The formula for a rank; places count tensor first, then data, then pipeline."""
    config = configure(settings, RECIPES[dtype], layout, "optimizer.global_batch=8", "parallel.microbatch=1")
    place, element = rank // layout.tensor, dtype.itemsize
    plan = stage_plans(config)[place // layout.data]
    tensors = stage_tensors(SHAPE, plan, tensor=layout.tensor)
    owners = layout.data if layout.shards else 1
    owner = place % layout.data if layout.shards else 0
    is_tied_here = plan.is_first and plan.is_last
    return Static(
        parameter_bytes(tensors, element_bytes=element),
        gradient_bytes(tensors, element_bytes=element, owners=owners, is_tied_here=is_tied_here),
        optimizer_bytes(tensors, element_bytes=element, owners=owners, owner=owner),
    )


@pytest.fixture(scope="module")
def statics(ranks, data) -> dict[Layout, list[dict[torch.dtype, Static]]]:
    return {layout: ranks.run(layout.world, measure_static, data, layout) for layout in MESHES}


@pytest.mark.parametrize("dtype", RECIPES, ids=str)
@pytest.mark.parametrize("layout", MESHES, ids=name_of)
def test_weights_gradients_and_optimizer_take_the_bytes_of_the_formula(statics, data, layout, dtype):
    for rank, measured in enumerate(statics[layout]):
        if rank % layout.tensor == 0:  # the others may have fewer words
            assert measured[dtype] == computed(data, layout, dtype, rank), rank


@pytest.mark.parametrize("dtype", RECIPES, ids=str)
def test_optimizer_falls_as_one_over_data(statics, dtype):
    """Up to rows that do not divide, of which the first owner has one more, and a counter for each tensor."""
    (whole,) = statics[Layout()]
    assert all(each[dtype].optimizer == whole[dtype].optimizer for each in statics[Layout(data=2)])
    num_tensors = len(stage_tensors(SHAPE, StagePlan(True, True, range(SHAPE.num_hidden_layers))))
    widest = SHAPE.intermediate_size
    for size in (2, 4):
        measured = [each[dtype].optimizer for each in statics[Layout(data=size, shards=True)]]
        assert sum(measured) - whole[dtype].optimizer <= (size - 1) * num_tensors * 4
        assert max(measured) <= whole[dtype].optimizer / size + num_tensors * (3 * 4 * widest + 4)
        assert max(measured) < 1.02 * whole[dtype].optimizer / size
