"""One training step: take batches, run the program, sum gradients, move the weights; and an evaluation."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.errors import NotFiniteError
from megatron_bert_tp.model.chunks import Chunks
from megatron_bert_tp.model.stage import PretrainingLogits
from megatron_bert_tp.objectives.pretraining import Counts, Losses, count, losses_of_step, microbatch_loss
from megatron_bert_tp.optim.batch_size import BatchSize
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.parallel.collectives import sum_over_
from megatron_bert_tp.parallel.mesh import Axis, ParallelMesh
from megatron_bert_tp.pipeline.executor import Executor
from megatron_bert_tp.pipeline.instructions import Program
from megatron_bert_tp.reliability.actions import Actions, Kind
from megatron_bert_tp.training.anomalies import AnomalyReport, Attribution
from megatron_bert_tp.training.diagnosis import Watch, attribute
from megatron_bert_tp.training.passes import Passes
from megatron_bert_tp.training.texts import Texts
from megatron_bert_tp.training.update import Done, Update, Updater

_NUM_STATISTICS = 4


class Steps(Protocol):
    """Where the microbatches of training come from (`data.loader.StepLoader` fits it)."""

    def take(self, samples_done: int) -> list[Batch]:
        """This replica's microbatches of the step that follows ``samples_done`` samples."""


@dataclass(frozen=True)
class Work:
    """What a pass over all microbatches of all ranks read and computed."""

    tokens: int
    """Real tokens."""
    positions: int
    """Positions that were computed, padding included."""


@dataclass(frozen=True)
class Pace:
    """How long a run is, how large its steps are, and how often it does what."""

    steps: int
    batch: BatchSize
    save_every: int
    evaluate_every: int
    evaluation_samples: int


@dataclass(frozen=True)
class StepReport:
    """One optimizer step as it is reported; ``step`` and ``samples`` count what is done, this step included."""

    step: int
    samples: int
    losses: Losses
    update: Update
    work: Work
    data_seconds: float
    """Time that this rank has waited for its batches."""


@dataclass(frozen=True)
class _Task:
    """What a step computes: its program, its microbatches and their labels."""

    program: Program
    batches: Sequence[Batch]
    counts: Counts


def _tell_nobody(_report: AnomalyReport) -> None:
    """Where nobody listens."""


class Trainer:
    """Everything that a run holds on one rank.

    ``on_anomaly`` is told what was wrong with a step, on every rank, before the run goes on or ends.
    """

    def __init__(
        self,
        chunks: Chunks,
        updater: Updater,
        texts: Texts,
        steps: Steps,
        *,
        mesh: ParallelMesh,
        agreement: Agreement,
        passes: Passes,
        device: torch.device,
        pace: Pace,
        steps_done: int = 0,
        samples_done: int = 0,
        actions: Actions | None = None,
    ) -> None:
        """``actions`` is told what this rank does; nobody is without."""
        self._actions = actions or Actions.silent()
        self.chunks, self.updater = chunks, updater
        self.texts, self.steps = texts, steps
        self.mesh, self.device, self.pace = mesh, device, pace
        self.steps_done, self.samples_done = steps_done, samples_done
        self.on_anomaly: Callable[[AnomalyReport], None] = _tell_nobody
        self._agreement, self._passes = agreement, passes
        self._held_out: list[Batch] | None = None

    def train_step(self) -> StepReport:
        """One optimizer step over the global batch.

        NotFiniteError, the same on all ranks, where its numbers are wrong and `run.anomalies` ends the run.
        """
        self._actions.begin_step(self.steps_done + 1)
        self._actions.enter(Kind.DATA, "waits for its batches")
        started = time.perf_counter()
        taken = self.steps.take(self.samples_done)
        data_seconds = time.perf_counter() - started
        batches = [batch.to(self.device) for batch in taken]
        self._actions.enter(Kind.MESSAGES, "counts the labels of all replicas")
        done = Done(self.steps_done, self.samples_done, self.pace.batch.global_batch_at(self.samples_done))
        program = self._passes.training(len(batches), self.mesh.pipeline.rank)
        task = _Task(program, batches, count(batches, self.mesh.data, self.device))
        self.updater.begin(len(batches))
        losses, work = self._run(task, loss_scale=self.updater.scale)
        update = self.updater.finish(losses.loss, done)
        self._report_anomaly(update, done, task)
        self.steps_done += 1
        self.samples_done += done.batch
        return StepReport(self.steps_done, self.samples_done, losses, update, work, data_seconds)

    def _report_anomaly(self, update: Update, done: Done, task: _Task) -> None:
        """Find out what was wrong with a step, if anything was, and tell it; NotFiniteError if it ends the run."""
        if update.anomaly is None:
            return
        self._actions.enter(Kind.DIAGNOSIS, "looks for what is wrong with the step")
        attribution = Attribution(update.tensors) if update.anomaly.is_spike else self._attribution(update, task)
        samples = range(done.samples, done.samples + done.batch)
        report = AnomalyReport(done.steps + 1, samples, update.anomaly, attribution)
        self.on_anomaly(report)
        if report.stops:
            raise NotFiniteError(report.message)

    def _attribution(self, update: Update, task: _Task) -> Attribution:
        """Where a step was first not finite.  It is computed again: the weights have not moved."""
        stages = self._passes.placement.stages[self.mesh.pipeline.rank]
        watch = Watch(self.chunks, stages, task.batches)

        def replay() -> bool:
            self.updater.begin(len(task.batches))
            losses, _ = self._run(task, watch=watch)
            norm = self.updater.gradients.reduce_and_norm()  # whatever the loss is: its messages are on their way
            return math.isfinite(losses.loss) and math.isfinite(norm)

        return attribute(watch, replay, task.batches, self._agreement, tensors=update.tensors)

    def evaluate(self) -> tuple[Losses, Counts]:
        """Losses on the held-out part: the same samples and masks every time, without dropout."""
        batches = self._held_out_batches()
        counts = count(batches, self.mesh.data, self.device)
        self.chunks.train(False)
        losses, _ = self._run(
            _Task(self._passes.evaluation(len(batches), self.mesh.pipeline.rank), batches, counts)
        )
        self.chunks.train()
        return losses, counts

    def _run(
        self, task: _Task, *, loss_scale: float = 1.0, watch: Watch | None = None
    ) -> tuple[Losses, Work]:
        """Walk the program; losses and work of all ranks, equal on each of them; ``watch`` looks at the losses."""
        num_classes = self.chunks.shape.vocab_size
        batches, counts = task.batches, task.counts

        def criterion(output: PretrainingLogits, batch: Batch) -> tuple[Tensor, Tensor]:
            return microbatch_loss(output, batch, counts, num_classes=num_classes, tensor=self.mesh.tensor)

        executor = Executor[Batch](
            self.chunks,
            criterion if watch is None else watch.of_loss(criterion),
            placement=self._passes.placement,
            axis=self.mesh.pipeline,
            channels=self.mesh.channels,
            device=self.device,
            observe=self._actions.instruction if watch is None else None,
        )
        statistics = executor.run(task.program, batches, loss_scale=loss_scale)
        totals = torch.zeros(_NUM_STATISTICS + 2, dtype=torch.float64, device=self.device)
        for values in statistics:
            totals[:_NUM_STATISTICS] += values
        if self.mesh.pipeline.is_last:
            totals[_NUM_STATISTICS] = sum(batch.num_tokens for batch in batches)
            totals[_NUM_STATISTICS + 1] = sum(batch.input_ids.numel() for batch in batches)
        sum_over_(sum_over_(totals, self.mesh.data), self.mesh.pipeline)
        tokens, positions = map(int, totals[_NUM_STATISTICS:].tolist())
        return losses_of_step(totals[:_NUM_STATISTICS], counts), Work(tokens, positions)

    def _held_out_batches(self) -> list[Batch]:
        if self._held_out is None:
            assert self.texts.validation is not None, "nothing is evaluated without a validation part"
            batches = self.texts.validation.evaluation(self.pace.evaluation_samples)
            self._held_out = [batch.to(self.device) for batch in batches]
        return self._held_out

    def unigram_loss(self, counts: Counts) -> float:
        """What a model of word frequencies alone gets on the same targets, over all data ranks."""
        own = count(self._held_out_batches(), Axis.alone("data"), self.device).masked

        def advance() -> None:
            self._actions.enter(Kind.EVALUATION, "counts the tokens of the training part")

        loss = self.texts.unigram_loss(self._held_out_batches(), advance=advance) if own else 0.0
        total = torch.tensor([loss * own], dtype=torch.float64, device=self.device)
        return sum_over_(total, self.mesh.data).item() / max(1, counts.masked)
