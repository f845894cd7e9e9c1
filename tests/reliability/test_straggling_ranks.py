"""A slow rank among real ranks: its peers wait for it in every layer, and are not taken for slow themselves."""

import time

import pytest

from megatron_bert_tp.objectives.pretraining import count, microbatch_loss
from megatron_bert_tp.parallel.mesh import ParallelMesh
from megatron_bert_tp.pipeline.executor import Executor
from megatron_bert_tp.pipeline.placement import straight
from megatron_bert_tp.reliability.actions import Actions, HostClock, Kind
from megatron_bert_tp.reliability.board import Board
from megatron_bert_tp.reliability.stragglers import Speed, StepTimes, Stragglers
from tests.support import CPU, ODD_SHAPE, Layout, Recipe, batches_of_step, build_mesh, build_stage, program_of

RECIPE = Recipe(shape=ODD_SHAPE)
SLEEP, SLOW_RANK, STEPS = 0.03, 1, 12


def waited(mesh: ParallelMesh) -> float:
    return sum(axis.waits.seconds for axis in (mesh.tensor, mesh.data, mesh.pipeline, mesh.tied))


def two_intervals(layout: Layout) -> list[list[float]]:
    """Numbers of two intervals on this rank, of which one sleeps in each forward."""
    mesh = build_mesh(layout)
    stage = build_stage(RECIPE, mesh)
    batches = batches_of_step(0, shape=RECIPE.shape)[:2]
    counts = count(batches, mesh.data, CPU)
    actions, times = Actions(Board.alone(), HostClock(lambda: waited(mesh))), StepTimes()
    if mesh.tensor.rank == SLOW_RANK:
        stage.register_forward_pre_hook(lambda *_: time.sleep(SLEEP))
    executor = Executor(
        [stage],
        lambda output, batch: microbatch_loss(
            output, batch, counts, num_classes=stage.shape.vocab_size, tensor=mesh.tensor
        ),
        placement=straight(1),
        axis=mesh.pipeline,
        channels=mesh.channels,
        device=CPU,
        observe=actions.instruction,
    )
    program = program_of("1f1b", mesh, len(batches))
    intervals = []
    for _ in range(2):
        for _ in range(STEPS):
            executor.run(program, batches)
            times.add(actions.take_seconds())
        intervals.append(times.take())
    return intervals


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(tensor=2, sequence=True)], ids=["whole", "sequence"])
def test_the_slow_rank_of_a_tensor_group_is_told_and_no_other(ranks, layout):
    numbers = ranks.run(2, two_intervals, layout)
    stragglers = Stragglers()
    reports = [stragglers.report([Speed.of(r, 0, numbers[r][i]) for r in range(2)]) for i in range(2)]
    forwards = [found for found in reports[1] if found.kind is Kind.FORWARD]
    assert [found.rank for found in forwards] == [SLOW_RANK]
    # Two microbatches a step; half of a sleep is left to the noise of a busy machine.
    assert forwards[0].seconds - forwards[0].median > 1.5 * SLEEP
