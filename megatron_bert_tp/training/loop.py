"""The training loop: steps, reports, evaluations and checkpoints, until the last step or a request to stop."""

import time
from collections import deque
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, cast

from megatron_bert_tp.errors import StoppedError
from megatron_bert_tp.reliability.actions import Kind
from megatron_bert_tp.training.evaluation import Evaluation
from megatron_bert_tp.training.progress import Record
from megatron_bert_tp.training.run_directory import RunDirectory
from megatron_bert_tp.training.stopping import first_save_seconds
from megatron_bert_tp.training.supervision import Supervision
from megatron_bert_tp.training.trainer import StepLosses, StepReport, Trainer

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_RECENT = 50


class Loop:
    """A run on one rank, from where its trainer stands."""

    def __init__(
        self, trainer: Trainer, directory: RunDirectory, supervision: Supervision, evaluation: Evaluation
    ) -> None:
        self._trainer, self._directory, self._supervision = trainer, directory, supervision
        self._evaluation = evaluation
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._saved_steps = trainer.steps_done
        self._evaluation_seconds = 0.0
        num_bytes = sum(3 * owned.weight.nbytes for owned in trainer.updater.weights.owned)
        all_bytes = sum(row[0] for row in supervision.agreement.gathered([num_bytes]))
        self._first_save = first_save_seconds(int(all_bytes))

    def run(self) -> None:
        """Train to the last step; saves and evaluates on the way and at the end.

        StoppedError, on all ranks after the same step and with that step saved, where any rank was asked to stop.
        """
        trainer = self._trainer
        if self._is_evaluated and self._directory.lacks_evaluation(trainer.steps_done, self._evaluation.counts):
            self._evaluate()
        while not self.is_over:
            self._step()
            for line in self._supervision.look_after(trainer, is_saved=self._is_due(trainer.pace.save_every)):
                self._directory.say(line)
            self._meet()
            if self._is_due(trainer.pace.save_every):
                self._begin_save()
            if self._is_evaluated:
                self._evaluate()
                self._meet()  # it may have taken long
        self._save_for_sure()

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to train."""
        return self._trainer.steps_done >= self._trainer.pace.steps or self._evaluation.is_over

    def _step(self) -> None:
        started = time.perf_counter()
        report = self._trainer.train_step()
        self._seconds.append(time.perf_counter() - started)
        self._supervision.expect_steps_of(median(self._seconds))
        self._directory.report_step(_record(report, self._seconds, self._trainer.pace.steps))

    def _meet(self) -> None:
        """All ranks hear of stop requests and finished checkpoints; StoppedError where one is to stop."""
        trainer, directory, supervision = self._trainer, self._directory, self._supervision
        supervision.actions.enter(Kind.AGREEMENT, f"meets all ranks after step {trainer.steps_done}")
        saving = self._first_save if directory.save_seconds is None else directory.save_seconds
        evaluating = self._evaluation_seconds if self._is_evaluated else 0.0
        reason, is_writing = supervision.stopping.agree(
            is_writing=directory.is_writing,
            step_seconds=median(self._seconds),
            save_seconds=saving,
            more_seconds=evaluating,
        )
        if not is_writing:
            self._finish_save()
        if reason is not None and not self.is_over:
            self._stop(reason)

    def _begin_save(self) -> None:
        self._supervision.actions.enter(Kind.SAVING, "waits for the checkpoint before")
        self._finish_save()
        self._write()
        if not self._directory.saves_in_background:
            self._finish_save()

    def _write(self) -> None:
        trainer = self._trainer
        self._supervision.actions.enter(Kind.SAVING, f"saves step {trainer.steps_done}")
        self._directory.begin_save(
            trainer.chunks, trainer.updater, steps_done=trainer.steps_done, samples_done=trainer.samples_done
        )
        self._saved_steps = trainer.steps_done

    def _finish_save(self) -> None:
        if not self._directory.finish_save():
            self._saved_steps = -1  # it must be tried again before the run may stop

    def _save_for_sure(self) -> None:
        """See that there is a checkpoint of this step; SaveError where there cannot be, in any case."""
        self._supervision.actions.enter(Kind.SAVING, "waits for the checkpoint that is being written")
        self._finish_save()
        if self._saved_steps != self._trainer.steps_done:
            self._supervision.check_before_save(self._trainer)
            self._write()
            self._directory.finish_save(must_succeed=True)

    def _stop(self, reason: str) -> None:
        self._save_for_sure()
        raise StoppedError(
            f"stopped after step {self._trainer.steps_done} of {self._trainer.pace.steps} ({reason}); all is "
            f"saved in {self._directory.newest_checkpoint()}, and the same command goes on from there",
            reason=reason,
        )

    def _evaluate(self) -> None:
        trainer = self._trainer
        self._supervision.actions.enter(Kind.EVALUATION, f"evaluates after step {trainer.steps_done}")
        started = time.perf_counter()
        with self._supervision.actions.within(Kind.EVALUATION):
            measured = self._evaluation.measure(trainer)
        self._directory.report_evaluation(measured.record)
        self._evaluation_seconds = time.perf_counter() - started
        if measured.is_best:
            self._keep_best()

    def _keep_best(self) -> None:
        """Save what was measured; only a checkpoint that stands takes the place of the best one before."""
        if self._saved_steps != self._trainer.steps_done:
            self._supervision.check_before_save(self._trainer)
            self._begin_save()
        self._finish_save()
        is_saved = self._saved_steps == self._trainer.steps_done
        if is_saved:
            self._directory.keep_for_good(self._trainer.steps_done)
        self._evaluation.settle(is_saved=is_saved)

    @property
    def _is_evaluated(self) -> bool:
        """Whether there is an evaluation after the step just done."""
        return self._evaluation.is_due(self._trainer.steps_done)

    def _is_due(self, every: int) -> bool:
        trainer = self._trainer
        return trainer.steps_done % every == 0 or trainer.steps_done == trainer.pace.steps


def _loss_fields(losses: StepLosses) -> Record:
    return {"loss": losses.loss, **asdict(cast("DataclassInstance", losses))}


def _record(report: StepReport, seconds: deque[float], steps: int) -> Record:
    return {
        "step": report.step,
        "samples": report.samples,
        **_loss_fields(report.losses),
        "grad_norm": report.update.grad_norm,
        "learning_rate": report.update.learning_rate,
        "weight_decay": report.update.weight_decay,
        "tokens": report.work.tokens,
        "tokens_per_second": report.work.tokens / seconds[-1],
        "padding": 1 - report.work.tokens / report.work.positions,
        "seconds": seconds[-1],
        "data_seconds": report.data_seconds,
        "seconds_left": (steps - report.step) * median(seconds),
        "loss_scale": report.update.loss_scale,
        "skipped": int(report.update.is_skipped),
    }
