"""What a run tells: one console line and one JSON record a step, and a bar with the time left."""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from megatron_bert_tp.errors import TrainingError

Record = Mapping[str, float | int | str]
METRICS = "metrics.jsonl"
"""File of the folder of a run."""
EVALUATION = "evaluation"
"""Kind of a record, beside ``step``."""


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, flushed as it is written."""

    def __init__(self, path: Path, *, steps_done: int) -> None:
        """Records after ``steps_done`` belong to steps that are run again, and are cut off."""
        self.earlier = keep_records(path, steps_done)
        """Records of the steps that are done."""
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one record."""
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            error.filename = self._file.name
            raise

    def close(self) -> None:
        """Write what is left, if it can be written."""
        with suppress(OSError):
            self._file.close()


def read_records(path: Path) -> list[dict[str, float | int | str]]:
    """All whole records of a metrics file; a last line that was cut off by a crash is left out.

    A number that the file has as null was not finite, and is nan here.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        records = [_parsed(line) for line in lines if line]
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{path}: has a line that is no JSON ({error}); mend or move the file away") from error
    return [{key: math.nan if value is None else value for key, value in record.items()} for record in records]


def _parsed(line: str) -> dict[str, float | int | str | None]:
    """One record; ValueError for any other JSON."""
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError("it is no record of a step")
    return record


def _line(record: Record) -> str:
    """One line of a metrics file: what is not finite, as JSON has no such numbers, is null."""
    finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def keep_records(path: Path, steps_done: int) -> list[dict[str, float | int | str]]:
    """Cut off the records of later steps, which are run again, and give the others; a missing file has none."""
    if not path.exists():
        return []
    kept = [record for record in read_records(path) if int(record["step"]) <= steps_done]
    text = "".join(map(_line, kept))
    if text != path.read_text(encoding="utf-8"):  # a finished run is looked at, and not changed
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    return kept


class Lines(Protocol):
    """How records look on the console."""

    def step(self, record: Record, steps: int) -> str:
        """One step of ``steps``, with the time left at the present speed."""

    def evaluation(self, record: Record) -> str:
        """One evaluation."""


class Reporter(AbstractContextManager["Reporter"]):
    """Console and metrics file of a run; made on the one rank that speaks for all."""

    def __init__(
        self,
        metrics: MetricsFile,
        console: Console,
        *,
        steps: int,
        steps_done: int,
        log_every: int,
        lines: Lines,
    ) -> None:
        self._metrics, self._console, self._lines = metrics, console, lines
        self._steps, self._log_every = steps, log_every
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._is_mute = False
        self._task = self._bar.add_task("training", total=steps, completed=steps_done)

    def __enter__(self) -> "Reporter":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._metrics.close()

    def say(self, text: str) -> None:
        """One line on the console; a console that is gone ends no run."""
        if self._is_mute:
            return
        try:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        except (OSError, SystemExit):  # the latter is rich's answer to a closed pipe
            self._is_mute = True
            self._bar.disable = True
            # Or Python complains again of what it could not write, at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def lacks_evaluation(self, steps_done: int, counts: Callable[[Record], bool]) -> bool:
        """Whether metrics.jsonl ends with step ``steps_done`` and has no evaluation of it that ``counts``."""
        records = [record for record in self._metrics.earlier if record["step"] == steps_done]
        return bool(records) and not any(record["kind"] == EVALUATION and counts(record) for record in records)

    def step(self, record: Record) -> None:
        """Report one optimizer step."""
        self._metrics.write({"kind": "step", **record})
        number = int(record["step"])
        self._bar.update(self._task, completed=number)
        if number % self._log_every == 0 or number == self._steps or record["skipped"]:
            self.say(self._lines.step(record, self._steps))

    def evaluation(self, record: Record) -> None:
        """Report one evaluation."""
        self._metrics.write({"kind": EVALUATION, **record})
        self.say(self._lines.evaluation(record))


@dataclass(frozen=True)
class PretrainingLines:
    """``pairs`` is the sentence-pair task; ``shows_scale`` is set where the loss is scaled."""

    pairs: str = "nsp"
    shows_scale: bool = False

    def step(self, record: Record, steps: int) -> str:
        """Losses, accuracies and speed of a step."""
        return (
            f"step {record['step']:>6}/{steps}  loss {record['loss']:.4f}  mlm {record['mlm_loss']:.4f} "
            f"({100 * float(record['mlm_accuracy']):.1f}%){self._pair_loss(record)}  "
            f"{pace_of_step(record, shows_scale=self.shows_scale)}"
        )

    def evaluation(self, record: Record) -> str:
        """Losses on the held-out part."""
        unigram = f"  unigram {record['unigram_loss']:.4f}" if "unigram_loss" in record else ""
        return (
            f"held-out at step {record['step']}: mlm {record['mlm_loss']:.4f} "
            f"({100 * float(record['mlm_accuracy']):.1f}%){self._pair_loss(record)}  "
            f"{record['masked']:,} masked tokens{unigram}"
        )

    def _pair_loss(self, record: Record) -> str:
        if self.pairs == "none":
            return ""
        return f"  {self.pairs} {record['nsp_loss']:.4f} ({100 * float(record['nsp_accuracy']):.0f}%)"


def pace_of_step(record: Record, *, shows_scale: bool) -> str:
    """Norm, rate and speed of a step, which are told of any training."""
    left = timedelta(seconds=round(float(record["seconds_left"])))
    return (
        f"norm {record['grad_norm']:.3f}  rate {record['learning_rate']:.2e}{_scale(record, shows_scale)}  "
        f"{record['tokens_per_second']:,.0f} tokens/s  data {record['data_seconds']:.2f} s  left {left}"
    )


def _scale(record: Record, shows_scale: bool) -> str:
    if not shows_scale:
        return ""
    return f"  scale {record['loss_scale']:g}{' overflowed, step skipped' if record['skipped'] else ''}"
