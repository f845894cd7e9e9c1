"""One training step: take batches, run the program, sum gradients, move the weights."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_bert_tp.errors import NotFiniteError
from megatron_bert_tp.model.chunks import Chunks
from megatron_bert_tp.optim.batch_size import BatchSize
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.parallel.collectives import sum_over_
from megatron_bert_tp.parallel.mesh import Axis, ParallelMesh
from megatron_bert_tp.reliability.actions import Kind
from megatron_bert_tp.training.anomalies import AnomalyReport, Attribution
from megatron_bert_tp.training.diagnosis import Watch, attribute
from megatron_bert_tp.training.pipeline import Pipeline
from megatron_bert_tp.training.update import Done, Update, Updater


class Microbatch(Protocol):
    """What a trainer itself asks of a microbatch; what is in it is between the stages and the objective."""

    @property
    def num_tokens(self) -> int:
        """Real (not padding) tokens."""
    @property
    def input_ids(self) -> Tensor:
        """``[batch, sequence]`` int64."""
    def to(self, device: torch.device) -> "Microbatch":
        """The same on ``device``."""


class StepLosses(Protocol):
    """Losses of a step; the fields of the dataclass that it is are reported."""

    @property
    def loss(self) -> float:
        """What is minimised."""


class Objective(Protocol):
    """What is minimised, as sums over counts that are known before the forward (`objectives` has two)."""

    @property
    def num_statistics(self) -> int:
        """Numbers that a microbatch reports."""

    def count(self, batches: Sequence[Any], data: Axis, device: torch.device) -> Any:
        """Labels of a step, over all ranks of ``data``."""

    def share(self, output: Any, batch: Any, counts: Any) -> tuple[Tensor, Tensor]:
        """A microbatch's share of the loss, and its statistics, float64."""

    def losses(self, statistics: Tensor, counts: Any) -> StepLosses:
        """Losses of a step from the added statistics."""


class Steps(Protocol):
    """Where the microbatches of training come from (`data.loader.StepLoader` fits it)."""

    def take(self, samples_done: int) -> Sequence[Any]:
        """This replica's microbatches of the step that follows ``samples_done`` samples."""


@dataclass(frozen=True)
class Work:
    """What a pass over all microbatches of all ranks read and computed."""

    tokens: int
    """Real tokens."""
    positions: int
    """Positions that were computed, padding included."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long a run is, how large its steps are, how often it saves, and which setting says how it warms up."""

    steps: int
    batch: BatchSize
    save_every: int
    warmup_setting: str


@dataclass(frozen=True)
class StepReport:
    """One optimizer step as it is reported; ``step`` and ``samples`` count what is done, this step included."""

    step: int
    samples: int
    losses: StepLosses
    update: Update
    work: Work
    data_seconds: float
    """Time that this rank has waited for its batches."""


@dataclass(frozen=True)
class _Task:
    """What a step computes: its microbatches and their labels."""

    batches: Sequence[Any]
    counts: Any


def _tell_nobody(_report: AnomalyReport) -> None:
    """Where nobody listens."""


class Trainer:
    """Everything that a run holds on one rank.

    ``on_anomaly`` is told what was wrong with a step, on every rank, before the run goes on or ends.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        updater: Updater,
        objective: Objective,
        steps: Steps,
        *,
        agreement: Agreement,
        pace: Pace,
        steps_done: int = 0,
        samples_done: int = 0,
    ) -> None:
        self.pipeline, self.updater, self.objective, self.steps = pipeline, updater, objective, steps
        self.pace, self.steps_done, self.samples_done = pace, steps_done, samples_done
        self.on_anomaly: Callable[[AnomalyReport], None] = _tell_nobody
        self._agreement, self._actions = agreement, pipeline.actions

    @property
    def chunks(self) -> Chunks:
        """The stages of this rank."""
        return self.pipeline.chunks

    @property
    def mesh(self) -> ParallelMesh:
        """Where this rank stands."""
        return self.pipeline.mesh

    @property
    def device(self) -> torch.device:
        """What this rank computes on."""
        return self.pipeline.device

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
        task = _Task(batches, self.objective.count(batches, self.mesh.data, self.device))
        self.updater.begin(len(batches))
        losses, work = self._run(task, loss_scale=self.updater.scale)
        update = self.updater.finish(losses.loss, done)
        self._report_anomaly(update, done, task)
        self.steps_done += 1
        self.samples_done += done.batch
        return StepReport(self.steps_done, self.samples_done, losses, update, work, data_seconds)

    def measure(self, batches: Sequence[Any]) -> tuple[StepLosses, Any]:
        """Losses on this replica's ``batches`` and those of the others, without dropout; and their labels."""
        counts = self.objective.count(batches, self.mesh.data, self.device)
        statistics = self.pipeline.measure(batches, lambda out, batch: self.objective.share(out, batch, counts))
        return self._added(statistics, batches, counts)[0], counts

    def _report_anomaly(self, update: Update, done: Done, task: _Task) -> None:
        """Find out what was wrong with a step, if anything was, and tell it; NotFiniteError if it ends the run."""
        if update.anomaly is None:
            return
        self._actions.enter(Kind.DIAGNOSIS, "looks for what is wrong with the step")
        attribution = Attribution(update.tensors) if update.anomaly.is_spike else self._attribution(update, task)
        samples = range(done.samples, done.samples + done.batch)
        report = AnomalyReport(
            step=done.steps + 1,
            samples=samples,
            anomaly=update.anomaly,
            attribution=attribution,
            warmup_setting=self.pace.warmup_setting,
        )
        self.on_anomaly(report)
        if report.stops:
            raise NotFiniteError(report.message)

    def _attribution(self, update: Update, task: _Task) -> Attribution:
        """Where a step was first not finite.  It is computed again: the weights have not moved."""
        watch = Watch(self.chunks, self.pipeline.stages, task.batches)

        def replay() -> bool:
            self.updater.begin(len(task.batches))
            losses, _ = self._run(task, watch=watch)
            norm = self.updater.gradients.reduce_and_norm()  # whatever the loss is: its messages are on their way
            return math.isfinite(losses.loss) and math.isfinite(norm)

        return attribute(watch, replay, task.batches, self._agreement, tensors=update.tensors)

    def _run(
        self, task: _Task, *, loss_scale: float = 1.0, watch: Watch | None = None
    ) -> tuple[StepLosses, Work]:
        """Forwards and backwards; losses and work of all ranks; ``watch`` looks at the losses."""

        def criterion(output: Any, batch: Any) -> tuple[Tensor, Tensor]:
            return self.objective.share(output, batch, task.counts)

        statistics = self.pipeline.train(
            task.batches,
            criterion if watch is None else watch.of_loss(criterion),
            loss_scale=loss_scale,
            is_observed=watch is None,
        )
        return self._added(statistics, task.batches, task.counts)

    def _added(self, statistics: Sequence[Tensor], batches: Sequence[Any], counts: Any) -> tuple[StepLosses, Work]:
        """Losses and work of all ranks, equal on each of them."""
        num = self.objective.num_statistics
        totals = torch.zeros(num + 2, dtype=torch.float64, device=self.device)
        for values in statistics:
            totals[:num] += values
        if self.mesh.pipeline.is_last:
            totals[num] = sum(batch.num_tokens for batch in batches)
            totals[num + 1] = sum(batch.input_ids.numel() for batch in batches)
        sum_over_(sum_over_(totals, self.mesh.data), self.mesh.pipeline)
        tokens, positions = map(int, totals[num:].tolist())
        return self.objective.losses(totals[:num], counts), Work(tokens, positions)
