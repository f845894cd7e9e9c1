"""The training loop: steps, reports, evaluations and checkpoints, to the last step."""

import time
from collections import deque
from dataclasses import asdict
from statistics import median

from megatron_bert_tp.objectives.pretraining import Losses
from megatron_bert_tp.training.progress import Record
from megatron_bert_tp.training.run_directory import RunDirectory
from megatron_bert_tp.training.trainer import StepReport, Trainer


def run(trainer: Trainer, directory: RunDirectory) -> None:
    """Train to the last step; saves and evaluates on the way and at the end."""
    seconds: deque[float] = deque(maxlen=50)
    if _is_evaluated(trainer) and directory.lacks_evaluation(trainer.steps_done):
        directory.report_evaluation(_evaluation(trainer))
    while trainer.steps_done < trainer.pace.steps:
        started = time.perf_counter()
        report = trainer.train_step()
        seconds.append(time.perf_counter() - started)
        directory.report_step(_record(report, seconds, trainer.pace.steps))
        if _is_due(trainer, trainer.pace.save_every):
            directory.save(
                trainer.chunks, trainer.updater, steps_done=trainer.steps_done, samples_done=trainer.samples_done
            )
        if _is_evaluated(trainer):
            directory.report_evaluation(_evaluation(trainer))


def _is_evaluated(trainer: Trainer) -> bool:
    """Whether the step just done is one after which the held-out part is looked at."""
    return trainer.texts.validation is not None and _is_due(trainer, trainer.pace.evaluate_every)


def _is_due(trainer: Trainer, every: int) -> bool:
    return trainer.steps_done % every == 0 or trainer.steps_done == trainer.pace.steps


def _evaluation(trainer: Trainer) -> Record:
    losses, counts = trainer.evaluate()
    record: Record = {"step": trainer.steps_done, **_loss_fields(losses), "masked": counts.masked}
    if trainer.steps_done < trainer.pace.steps:
        return record
    return {**record, "unigram_loss": trainer.unigram_loss(counts)}


def _loss_fields(losses: Losses) -> Record:
    return {"loss": losses.loss, **asdict(losses)}


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
