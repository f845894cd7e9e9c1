"""Evaluations of a task while it is trained: metrics, the best checkpoint, and when to give up."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_bert_tp.checkpoint.directories import step_directory
from megatron_bert_tp.checkpoint.manifest import MANIFEST
from megatron_bert_tp.config.problems import counted
from megatron_bert_tp.config.task_schema import TaskRun
from megatron_bert_tp.errors import ConfigError
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.tasks.batches import TaskBatches
from megatron_bert_tp.tasks.scoring import Scored, score
from megatron_bert_tp.tasks.task import TASKS
from megatron_bert_tp.training.evaluation import Measured
from megatron_bert_tp.training.failures import together
from megatron_bert_tp.training.outputs import Floats, outputs_of
from megatron_bert_tp.training.progress import METRICS, Record, pace_of_step, read_records
from megatron_bert_tp.training.run_directory import CHECKPOINTS
from megatron_bert_tp.training.task_data import Say, TaskData, TaskPart
from megatron_bert_tp.training.trainer import Trainer

_SMALLER_IS_BETTER = ("mean_squared_error",)
THRESHOLD = "best_threshold"
"""Metric of questions without answers: what the odds of no answer are compared with on the test part."""
BEST = "is_best"
"""Key of a record of metrics.jsonl: 1 where it was better than all before."""
MEASURED_ON = "measured_on"
"""Key of a record with the fingerprint of the samples: values of others are not compared."""


@dataclass(frozen=True)
class Standing:
    """How a run stands after its evaluations: step and value of the best one, and those since then."""

    step: int = 0
    value: float | None = None
    worse_since: int = 0

    def after(self, step: int, value: float, *, sign: float) -> "Standing":
        """The standing after another evaluation; ``sign`` is -1 where smaller is better."""
        if self.value is None or sign * value > sign * self.value:
            return Standing(step, value)
        return self.passed_over()

    def passed_over(self) -> "Standing":
        """The standing after an evaluation that does not count as the best, whatever its value."""
        return replace(self, worse_since=self.worse_since + 1)


class TaskEvaluation:
    """Metrics on the validation part, every so many steps and after the last one."""

    def __init__(
        self,
        config: TaskRun,
        data: TaskData,
        batches: TaskBatches,
        *,
        agreement: Agreement,
        every: int,
        last_step: int,
        standing: Standing,
    ) -> None:
        """``batches`` are those of the validation part."""
        assert data.validation is not None, "there is something to measure by"
        self._config, self._data, self._part = config, data, data.validation
        self._batches, self._agreement = batches, agreement
        self._every, self._last_step = every, last_step
        self.standing = self._before = standing
        self._sign = sign_of(metric_of(config))

    @property
    def best_step(self) -> int | None:
        """Step of the best evaluation so far."""
        return self.standing.step or None

    @property
    def is_over(self) -> bool:
        """Whether `run.patience` is at its end."""
        patience = self._config.run.patience
        return patience is not None and self.standing.worse_since >= patience

    def is_due(self, steps_done: int) -> bool:
        """Whether there is one after so many steps."""
        return steps_done % self._every == 0 or steps_done == self._last_step

    def counts(self, record: Record) -> bool:
        """Whether an evaluation on record is of the same samples, by the same metric."""
        return _counts(record, self._config, self._data)

    def measure(self, trainer: Trainer) -> Measured:
        """Loss and metrics of the weights as they are; the metrics are on the first rank alone."""
        outputs, losses = outputs_of(trainer.pipeline, self._part.table, self._batches, trainer.objective)
        metrics = self._metrics(outputs)
        value = self._agreement.gathered([metrics.get(metric_of(self._config), 0.0)])[0][0]
        self._before = self.standing
        self.standing = self.standing.after(trainer.steps_done, value, sign=self._sign)
        is_best = self.standing.step == trainer.steps_done
        loss = {} if losses is None else {"loss": losses.loss}
        record: Record = {"step": trainer.steps_done, **loss, **metrics, BEST: int(is_best)}
        return Measured({**record, MEASURED_ON: self._data.measured_on}, is_best)

    def settle(self, *, is_saved: bool) -> None:
        """Without a checkpoint the best one is that before."""
        if not is_saved:
            self.standing = self._before.passed_over()

    def _metrics(self, outputs: Floats) -> dict[str, float]:
        """On the first rank; the others need to know no more than one number."""
        metrics: dict[str, float] = {}
        with together(self._agreement):
            if self._agreement.rank == 0:
                metrics = dict(scored(self._config, self._data, self._part, outputs).metrics)
                check_metric(metric_of(self._config), metrics)
        return metrics


def scored(
    config: TaskRun, data: TaskData, part: TaskPart, outputs: Floats, *, null_threshold: float = 0.0
) -> Scored:
    """Metrics and predictions of a part from the outputs of all its samples; the threshold as for `score`."""
    names = None if data.labels is None else data.labels.names
    task = data.task(config.task)
    return score(task, part.examples, part.table, outputs, labels=names, null_threshold=null_threshold)


def metric_of(config: TaskRun) -> str:
    """Metric by which evaluations are compared."""
    return config.run.metric or TASKS[config.task.name].metrics[0]


def sign_of(metric: str) -> float:
    """1 where more is better, else -1."""
    return -1.0 if metric.startswith(_SMALLER_IS_BETTER) else 1.0


def check_validation_metric(config: TaskRun, data: TaskData) -> None:
    """ConfigError, before hours of training, where ``run.metric`` will not be measured on the validation data."""
    if data.validation is None:
        return
    task = TASKS[config.task.name]
    names = task.metrics + (task.threshold_metrics if data.task(config.task).unanswerable else ())
    groups = sorted({example.group for example in data.validation.examples})
    parts = [f"{name}_{group}" for group in groups for name in names] if len(groups) > 1 else []
    check_metric(metric_of(config), (*names, *parts))


def check_metric(name: str, metrics: Collection[str]) -> None:
    """ConfigError where ``run.metric`` is not measured on this data."""
    if name not in metrics:
        raise ConfigError(f"run.metric is {name!r}, but measured are {', '.join(metrics)}; set one of these")


def standing_of(
    directory: Path, config: TaskRun, data: TaskData, steps_done: int, *, agreement: Agreement, say: Say
) -> Standing:
    """How the run in ``directory`` stands after the evaluations on record, up to ``steps_done``.

    Those on other samples or by another metric do not count, which is told, and only what has a checkpoint can be
    the best.  Every rank must call it.
    """
    standing = Standing()
    with together(agreement):
        if agreement.rank == 0:
            before = _evaluations(directory, steps_done)
            records = [record for record in before if _counts(record, config, data)]
            if others := len(before) - len(records):
                say(
                    f"{directory}: {others} of {counted(len(before), 'evaluation')} on record left out, since "
                    "data.validation, the labels or run.metric were others; the best model is sought among the "
                    f"rest, and from step {steps_done} on"
                )
            standing = _of_records(records, metric_of(config), directory / CHECKPOINTS)
    value = float("nan") if standing.value is None else standing.value
    step, value, worse = agreement.gathered([standing.step, value, standing.worse_since])[0]
    return Standing(int(step), None if value != value else value, int(worse))


def _counts(record: Record, config: TaskRun, data: TaskData) -> bool:
    return record.get(MEASURED_ON) == data.measured_on and metric_of(config) in record


def _evaluations(directory: Path, steps_done: int) -> list[Record]:
    """Records of all evaluations of a run up to a step."""
    path = directory / METRICS
    records = read_records(path) if path.exists() else []
    return [record for record in records if MEASURED_ON in record and int(record["step"]) <= steps_done]


def _of_records(records: Sequence[Record], metric: str, checkpoints: Path) -> Standing:
    standing = Standing()
    for record in records:
        step = int(record["step"])
        after = standing.after(step, float(record[metric]), sign=sign_of(metric))
        has_checkpoint = (step_directory(checkpoints, step) / MANIFEST).is_file()
        standing = after if has_checkpoint else standing.passed_over()
    return standing


class NoEvaluation:
    """Where nothing is measured while a task is trained."""

    is_over = False
    best_step: int | None = None

    def is_due(self, _steps_done: int) -> bool:
        """Never."""
        return False

    def counts(self, _record: Record) -> bool:
        """Nobody asks."""
        return False

    def settle(self, *, is_saved: bool) -> None:
        """Nobody asks."""

    def measure(self, trainer: Trainer) -> Measured:
        """Nobody asks."""
        raise AssertionError(f"no evaluation is due after step {trainer.steps_done}")


@dataclass(frozen=True)
class TaskLines:
    """How steps and evaluations of a task look on the console."""

    shows_scale: bool = False

    def step(self, record: Record, steps: int) -> str:
        """Loss and speed of a step."""
        pace = pace_of_step(record, shows_scale=self.shows_scale)
        return f"step {record['step']:>6}/{steps}  loss {record['loss']:.4f}  {pace}"

    def evaluation(self, record: Record) -> str:
        """All metrics, and whether they are the best so far."""
        names = [name for name in record if name not in ("step", BEST, MEASURED_ON)]
        told = ", ".join(f"{name} {record[name]:.4f}" for name in names)
        return f"validation at step {record['step']}: {told}{' (best so far)' if record[BEST] else ''}"
