"""Who observes an executor sees its program, each instruction before it is carried out."""

import torch

from megatron_bert_tp.objectives.pretraining import count, microbatch_loss
from megatron_bert_tp.parallel.mesh import Axis, ParallelMesh
from megatron_bert_tp.pipeline.executor import Executor
from megatron_bert_tp.pipeline.placement import straight
from tests.support import CPU, ODD_SHAPE, Layout, Recipe, batches_of_step, build_mesh, build_stage, program_of

RECIPE = Recipe(shape=ODD_SHAPE)


class Doubling(torch.nn.Module):
    """A stage alone that writes down when it computes."""

    dtype, weight_gradients = torch.float32, None

    def __init__(self, log):
        super().__init__()
        self.weight, self._log = torch.nn.Parameter(torch.ones(())), log

    def forward(self, _received, batch):
        self._log.append(f"computes {batch}")
        return self.weight * batch


def test_the_observer_is_told_before_each_instruction_and_at_the_end():
    log: list[object] = []
    program = program_of("1f1b", ParallelMesh.alone(), 2)
    executor = Executor(
        [Doubling(log)],
        lambda output, _batch: (output, output.detach()),
        placement=straight(1),
        axis=Axis.alone("pipeline"),
        channels={},
        device=CPU,
        observe=log.append,
    )
    executor.run(program, [3, 4])
    forward, backward, *others = program
    assert log == [forward, "computes 3", backward, others[0], "computes 4", others[1], None]


def observed(schedule: str) -> bool:
    """Whether a rank of a pipeline sees its own program, messages too, and computes the same as without."""
    mesh = build_mesh(Layout(pipeline=2, schedule=schedule))
    batches = batches_of_step(0, shape=RECIPE.shape)
    program = program_of(schedule, mesh, len(batches))
    counts = count(batches, mesh.data, CPU)
    grads = []
    for observe in (None, (seen := []).append):
        stage = build_stage(RECIPE, mesh)
        executor = Executor(
            [stage],
            criterion_of(stage, mesh, counts),
            placement=straight(2),
            axis=mesh.pipeline,
            channels=mesh.channels,
            device=CPU,
            observe=observe,
        )
        executor.run(program, batches)
        grads.append([part.parameter.grad for part in stage.parts()])
    assert seen == [*program, None]
    return all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def criterion_of(stage, mesh, counts):
    def criterion(output, batch):
        return microbatch_loss(
            output, batch, counts, num_classes=stage.shape.vocab_size, tensor=mesh.tensor
        )

    return criterion


def test_a_rank_of_a_pipeline_sees_its_messages_too_and_computes_the_same(ranks):
    assert ranks.run(2, observed, "1f1b") == [True, True]
    assert ranks.run(2, observed, "zb-h1") == [True, True]
