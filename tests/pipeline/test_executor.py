"""The executor on real ranks against torch's own 1F1B, one process, and the promise to keep little."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.model.stage import MegatronBertStage, PretrainingLogits
from megatron_bert_tp.objectives.pretraining import Counts, count, microbatch_loss
from megatron_bert_tp.parallel.mesh import Axis, ParallelMesh
from megatron_bert_tp.parallel.weight_gradients import WeightGradients
from megatron_bert_tp.pipeline.executor import Executor
from megatron_bert_tp.pipeline.instructions import Await, Compute, Launch, Phase, Transfer
from megatron_bert_tp.pipeline.placement import straight
from tests.comparison import Piece, gradient_pieces, join
from tests.support import (
    CPU,
    IGNORED,
    ODD_SHAPE,
    Layout,
    Recipe,
    batches_of_step,
    build_mesh,
    build_stage,
    make_batch,
    run_passes,
    with_dropout,
)

RECIPE = Recipe(shape=with_dropout(ODD_SHAPE))
PIPELINES = [Layout(pipeline=p, schedule=s) for p in (2, 4) for s in ("1f1b", "gpipe", "zb-h1")]
# The same products in the same order: only torch's handling of messages lies between.
TOLERANCE = 1e-12


def name_of(layout: Layout) -> str:
    return f"pipeline{layout.pipeline}-{layout.schedule}"


def equal_batches() -> list[Batch]:
    """Six microbatches of one width: torch's schedule takes no other."""
    lengths = ((11, 9), (11, 11), (4, 11), (11, 5), (11, 11), (8, 11))
    return [
        make_batch(rows, shape=RECIPE.shape, first_sample=10 * index, seed=9) for index, rows in enumerate(lengths)
    ]


@dataclass(frozen=True)
class Answer:
    """Losses per microbatch (last stage) and gradients of this rank."""

    statistics: list[Tensor]
    gradients: list[Piece]


def tied_sum_left_out(stage: MegatronBertStage) -> list[Piece]:
    """Gradients straight after the backward: the two of the tied embeddings keep names of their own."""
    return [
        Piece(part.name, part.shape, part.offsets, part.view(part.parameter.grad).clone())
        for part in stage.parts()
    ]


def run_executor(layout: Layout, batches: Sequence[Batch]) -> Answer:
    mesh = build_mesh(layout)
    stage = build_stage(RECIPE, mesh)
    counts = count(batches, mesh.data, CPU)
    statistics = run_passes(stage, mesh, batches, counts, layout.schedule)
    has_backward = layout.schedule != "forward_only"
    return Answer(statistics, tied_sum_left_out(stage) if has_backward else gradient_pieces(stage.parts()))


class TorchStage(nn.Module):
    """A stage as torch's pipeline calls it: with the number of the microbatch; the last one gives its loss."""

    def __init__(
        self, stage: MegatronBertStage, mesh: ParallelMesh, batches: Sequence[Batch], counts: Counts
    ) -> None:
        super().__init__()
        self.stage, self.mesh, self.batches, self.counts = stage, mesh, batches, counts
        self.statistics: list[Tensor] = []

    def forward(self, received: Tensor, number: Tensor) -> Tensor:
        batch = self.batches[int(number)]
        output = self.stage(None if self.stage.plan.is_first else received, batch)
        if not self.stage.plan.is_last:
            return output
        num_classes = self.stage.shape.vocab_size
        loss, statistics = microbatch_loss(
            output, batch, self.counts, num_classes=num_classes, tensor=self.mesh.tensor
        )
        self.statistics.append(statistics)
        return loss.reshape(1)


def sum_of(losses: Tensor, _target: Tensor) -> Tensor:
    return losses.sum()


def run_torch(layout: Layout, batches: Sequence[Batch]) -> Answer:
    """The same stages under `torch.distributed.pipelining`, gradients unscaled, losses summed."""
    mesh = build_mesh(layout)
    stage = build_stage(RECIPE, mesh)
    module = TorchStage(stage, mesh, batches, count(batches, mesh.data, CPU))
    # torch sends gradients only for what needs one.
    hidden = torch.empty(stage.boundary_shape(batches[0]), dtype=RECIPE.dtype, requires_grad=True)
    first_input = torch.zeros(len(batches), 1)
    pipelined = PipelineStage(
        module,
        mesh.pipeline.rank,
        mesh.pipeline.size,
        CPU,
        input_args=(first_input[:1] if stage.plan.is_first else hidden,),
        output_args=(torch.empty(1, dtype=RECIPE.dtype) if stage.plan.is_last else hidden,),
        group=mesh.pipeline.group,
    )
    schedule = Schedule1F1B(pipelined, len(batches), loss_fn=sum_of, scale_grads=False)
    arguments = (first_input,) if stage.plan.is_first else ()
    target = torch.zeros(len(batches)) if stage.plan.is_last else None
    schedule.step(*arguments, number=torch.arange(len(batches)), target=target)
    return Answer(module.statistics, tied_sum_left_out(stage))


def joined(answers: Sequence[Answer]) -> dict[str, Tensor]:
    return join(piece for answer in answers for piece in answer.gradients)


def assert_equal_answers(found: Sequence[Answer], truth: Sequence[Answer], tolerance: float) -> None:
    ours, theirs = joined(found), joined(truth)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=tolerance, atol=tolerance, msg=name)
    statistics = [torch.stack(answers[-1].statistics) for answers in (found, truth)]
    torch.testing.assert_close(*statistics, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def torch_answers(ranks):
    return {size: ranks.run(size, run_torch, Layout(pipeline=size), equal_batches()) for size in (2, 4)}


@pytest.mark.parametrize("layout", PIPELINES, ids=name_of)
def test_losses_and_gradients_equal_those_of_torchs_schedule(ranks, torch_answers, layout):
    found = ranks.run(layout.world, run_executor, layout, equal_batches())
    assert_equal_answers(found, torch_answers[layout.pipeline], TOLERANCE)


@pytest.mark.parametrize("layout", PIPELINES, ids=name_of)
def test_microbatches_of_different_lengths_equal_one_process_to_the_bit(ranks, layout):
    batches = batches_of_step(1, shape=RECIPE.shape)
    assert len({batch.input_ids.shape for batch in batches}) == len(batches)
    found = ranks.run(layout.world, run_executor, layout, batches)
    assert_equal_answers(found, ranks.run(1, run_executor, Layout(), batches), 0)


@pytest.mark.parametrize("layout", PIPELINES, ids=name_of)
def test_only_the_last_stage_has_statistics(ranks, layout):
    batches = equal_batches()
    *others, last = ranks.run(layout.world, run_executor, layout, batches)
    assert [answer.statistics for answer in others] == [[]] * (layout.pipeline - 1)
    num_labels = [int((batch.masked_labels != IGNORED).sum()) for batch in batches]
    assert len(last.statistics) == len(batches)
    # Sums, not means: at random weights a masked token costs near ln 1003 = 6.9.
    assert all(4 * n < s[0] < 12 * n for s, n in zip(last.statistics, num_labels, strict=True))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_forward_only_gives_the_statistics_of_training_and_no_gradient(ranks, size):
    batches = batches_of_step(0, shape=RECIPE.shape)
    trained = ranks.run(size, run_executor, Layout(pipeline=size), batches)
    evaluated = ranks.run(size, run_executor, Layout(pipeline=size, schedule="forward_only"), batches)
    assert all(answer.gradients == [] for answer in evaluated)
    assert torch.equal(torch.stack(evaluated[-1].statistics), torch.stack(trained[-1].statistics))


@dataclass
class Wrapped:
    """A stage of a pipeline of two without peers: what it receives is put through ``compute``."""

    compute: Callable[[Tensor], Tensor]
    dtype: torch.dtype = torch.float64
    weight_gradients: WeightGradients = field(default_factory=WeightGradients)

    def __call__(self, received: Tensor, _batch: None) -> Tensor:
        return self.compute(received)

    def boundary_shape(self, _batch: None) -> tuple[int, ...]:
        return (2, 3)


class Work:
    """A message that has arrived."""

    def wait(self) -> None:
        pass


def test_a_stage_that_does_not_use_what_it_received_is_noticed(monkeypatch):
    """The last of two stages, whose messages arrive at once."""
    weight = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(dist, "irecv", lambda *_arguments: Work())
    executor = Executor(
        [Wrapped(lambda received: weight * received.detach())],
        lambda output, _batch: (output.sum(), output),
        placement=straight(2),
        axis=Axis("pipeline", (0, 1), 1),
        channels={(0, 1): None},
        device=CPU,
    )
    transfers = (Transfer(Phase.FORWARD, 0, 0, 0, 1),)
    passes = (Compute(Phase.FORWARD, 0), Compute(Phase.BACKWARD, 0))
    with pytest.raises(AssertionError, match="does not use what it received"):
        executor.run((Launch(transfers), Await(transfers), *passes), [None])


class _Held(torch.autograd.Function):
    """The identity, with a token that lives as long as the graph that it is part of."""

    @staticmethod
    def forward(ctx, x: Tensor, token: object) -> Tensor:
        ctx.token = token
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Token:
    """Something that a weak reference can watch."""


class WatchedStage(MegatronBertStage):
    """A stage that counts the graphs and outputs of microbatches which are alive at once."""

    def watch(self) -> None:
        self.tokens: weakref.WeakSet[Token] = weakref.WeakSet()
        self.peak, self.has_graph = 0, False

    def forward(self, received: Tensor | None, batch: Batch) -> Tensor | PretrainingLogits:
        output = super().forward(received, batch)
        token = Token()
        self.tokens.add(token)
        self.has_graph |= torch.is_grad_enabled()
        self.peak = max(self.peak, len(self.tokens))
        if isinstance(output, Tensor):
            return _Held.apply(output, token)
        return PretrainingLogits(_Held.apply(output.masked, token), output.next_sentence)


def peak_alive(layout: Layout) -> tuple[int, int, bool]:
    """Most microbatches alive at once, how many still are after the run, and whether any had a graph."""
    mesh = build_mesh(layout)
    stage = build_stage(RECIPE, mesh)
    stage.__class__ = WatchedStage
    stage.watch()
    batches = equal_batches()
    run_passes(stage, mesh, batches, count(batches, mesh.data, CPU), layout.schedule)
    return stage.peak, len(stage.tokens), stage.has_graph


@pytest.mark.parametrize(
    ("schedule", "alive"), [("1f1b", [4, 3, 2, 1]), ("gpipe", [6] * 4), ("forward_only", [1] * 4)]
)
def test_activations_alive_at_once_are_those_of_the_schedule(ranks, schedule, alive):
    """min(stages - stage, microbatches) in 1F1B; a forward alone keeps only what it is computing."""
    found = ranks.run(4, peak_alive, Layout(pipeline=4, schedule=schedule))
    assert found == [(peak, 0, schedule != "forward_only") for peak in alive]
