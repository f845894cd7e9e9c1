"""The folder of a run: settings, metrics, checkpoints, and how the run ended."""

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import torch

from megatron_bert_tp.checkpoint.background import Saver
from megatron_bert_tp.checkpoint.durable import JSON, readable
from megatron_bert_tp.checkpoint.model import MODEL
from megatron_bert_tp.config.dump import to_dict, write_config
from megatron_bert_tp.errors import CheckpointError
from megatron_bert_tp.formats.convert import LOWERCASE
from megatron_bert_tp.model.chunks import Chunks
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.parallel.mesh import ParallelMesh
from megatron_bert_tp.training.anomalies import AnomalyReport
from megatron_bert_tp.training.changes import CORPORA, SETTINGS, START
from megatron_bert_tp.training.failures import as_ours
from megatron_bert_tp.training.progress import Record, Reporter
from megatron_bert_tp.training.recipe import Recipe
from megatron_bert_tp.training.state import facts_of, held_rectangles
from megatron_bert_tp.training.update import Updater

CHECKPOINTS, ANOMALIES, SETTINGS_FILE = "checkpoints", "anomalies.jsonl", "config.yaml"
SAMPLES = "samples"
"""Fact of a checkpoint: the samples that its run has consumed."""


class RunDirectory:
    """What one rank writes into ``run.directory``; only the first rank has a reporter."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        mesh: ParallelMesh,
        agreement: Agreement,
        saver: Saver,
        reporter: Reporter | None,
        start: Path | None = None,
    ) -> None:
        """``start`` is the checkpoint that the run goes on from."""
        self._recipe, self._reporter, self._saver = recipe, reporter, saver
        self._mesh, self._agreement = mesh, agreement
        self.path = recipe.directory
        self._start = start
        self.save_seconds: float | None = None
        """Time that the latest checkpoint took."""
        self._lacks_records = False
        self.is_saving = False
        """Whether a checkpoint was begun and not finished."""

    def say(self, text: str) -> None:
        """One line on the console, from the first rank."""
        if self._reporter is not None:
            self._reporter.say(text)

    def report_step(self, record: Record) -> None:
        """One optimizer step, on console and in metrics.jsonl."""
        if self._reporter is not None:
            with self._despite_full_disk():
                self._reporter.step(record)

    def report_anomaly(self, report: AnomalyReport) -> None:
        """A step with wrong numbers: what is known in anomalies.jsonl, and a line unless the run ends of it."""
        if self._reporter is None:
            return
        with self._despite_full_disk(), (self.path / ANOMALIES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(report.record(), allow_nan=False) + "\n")
        if not report.stops:
            self.say(report.message)

    def lacks_evaluation(self, steps_done: int, counts: Callable[[Record], bool]) -> bool:
        """Whether a step of this folder has no evaluation on record that ``counts``; every rank must ask."""
        lacks = self._reporter is not None and self._reporter.lacks_evaluation(steps_done, counts)
        return bool(self._agreement.maximum([lacks])[0])

    def report_evaluation(self, record: Record) -> None:
        """One evaluation, on console and in metrics.jsonl."""
        if self._reporter is not None:
            with self._despite_full_disk():
                self._reporter.evaluation(record)

    @property
    def saves_in_background(self) -> bool:
        """Whether a checkpoint that was begun is written while the run goes on."""
        return self._recipe.run.save_in_background

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written on this rank."""
        return self._saver.is_busy

    def begin_save(self, chunks: Chunks, updater: Updater, *, steps_done: int, samples_done: int) -> None:
        """Begin to write a checkpoint of what all ranks hold, each tensor once."""
        self.is_saving = True
        self._saver.begin(
            steps_done,
            held_rectangles(chunks, updater, self._recipe.optimizer.name, self._mesh),
            facts={**self._facts(chunks, samples_done), **facts_of(updater)},
            attachments={name: self.path / name for name in self._recipe.tokenizer_files},
        )

    def keep_for_good(self, step: int) -> None:
        """Keep the checkpoint of ``step`` until another step is named; every rank must call it."""
        self._saver.keep = replace(self._saver.keep, best=step)

    def finish_save(self, *, must_succeed: bool = False) -> bool:
        """Wait for the checkpoint that is being written, and tell of it; False where it failed.

        SaveError, the same on all ranks, where it failed; with ``run.save_failure: continue`` it is told instead,
        unless it ``must_succeed``.
        """
        if not self.is_saving:
            return True
        self.is_saving = False
        try:
            saved = self._saver.finish()
        except CheckpointError as error:
            if must_succeed or self._recipe.run.save_failure == "stop":
                raise
            self.say(f"not saved: {error}\ntraining goes on; the next checkpoint is tried when it is due")
            return False
        assert saved is not None, "a checkpoint was begun"
        self.save_seconds = saved.seconds
        for line in saved.cleared:
            self.say(line)
        self.say(f"checkpoint {saved.path}: {readable(saved.num_bytes)} in {saved.seconds:.1f} s")
        return True

    @contextmanager
    def _despite_full_disk(self) -> Iterator[None]:
        """Context manager around a record: where training goes on without checkpoints, it does without records."""
        try:
            yield
        except OSError as error:
            if self._recipe.run.save_failure == "stop":
                raise
            if not self._lacks_records:
                self.say(f"{as_ours(error)}; records from here on are missing until they can be written")
            self._lacks_records = True

    def newest_checkpoint(self) -> str | None:
        """The newest checkpoint that this run has written, else the one that it goes on from."""
        newest = self._saver.newest or self._start
        return None if newest is None else str(newest)

    def _facts(self, chunks: Chunks, samples: int) -> Mapping[str, JSON]:
        return {
            MODEL: asdict(chunks.shape),
            SETTINGS: cast(JSON, to_dict(self._recipe.given)),
            CORPORA: list(self._recipe.fingerprints),
            LOWERCASE: self._recipe.lowercase,
            SAMPLES: samples,
            **({} if self._recipe.start is None else {START: self._recipe.start}),
            **self._recipe.facts,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }


def keep_settings(recipe: Recipe) -> None:
    """Write settings and tokenizer into the folder of the run; the first rank does it for all."""
    write_config(recipe.given, recipe.directory / SETTINGS_FILE)
    for name, source in recipe.tokenizer_files.items():
        copy = recipe.directory / name
        if not (copy.exists() and source.samefile(copy)):
            fresh = copy.with_name(f"{copy.name}.new")
            shutil.copyfile(source, fresh)
            os.replace(fresh, copy)
