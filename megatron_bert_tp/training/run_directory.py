"""The folder of a run: settings, metrics and checkpoints, and where a run goes on."""

import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch

from megatron_bert_tp.checkpoint.durable import JSON
from megatron_bert_tp.checkpoint.model import MODEL
from megatron_bert_tp.checkpoint.save import save_checkpoint
from megatron_bert_tp.config.dump import to_dict, write_config
from megatron_bert_tp.config.environment import LaunchEnvironment
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.errors import TrainingError
from megatron_bert_tp.formats.convert import LOWERCASE
from megatron_bert_tp.model.chunks import Chunks
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.parallel.mesh import ParallelMesh
from megatron_bert_tp.training.failures import together
from megatron_bert_tp.training.progress import Record, Reporter
from megatron_bert_tp.training.state import facts_of, held_rectangles
from megatron_bert_tp.training.update import Updater

CHECKPOINTS = "checkpoints"
SETTINGS, SAMPLES = "settings", "samples"
"""Facts of a checkpoint: all settings of its run, and the samples that it has consumed."""


class RunDirectory:
    """What one rank writes into ``run.directory``; only the first rank has a reporter."""

    def __init__(
        self,
        config: Config,
        environment: LaunchEnvironment,
        *,
        mesh: ParallelMesh,
        agreement: Agreement,
        reporter: Reporter | None,
    ) -> None:
        self._config, self._environment, self._reporter = config, environment, reporter
        self._mesh, self._agreement = mesh, agreement
        self.path = Path(config.run.directory)

    def say(self, text: str) -> None:
        """One line on the console, from the first rank."""
        if self._reporter is not None:
            self._reporter.say(text)

    def report_step(self, record: Record) -> None:
        """One optimizer step, on console and in metrics.jsonl."""
        if self._reporter is not None:
            self._reporter.step(record)

    def lacks_evaluation(self, steps_done: int) -> bool:
        """Whether a run of this folder was ended between a step and its evaluation; every rank must ask."""
        lacks = self._reporter is not None and self._reporter.lacks_evaluation(steps_done)
        return bool(self._agreement.maximum([lacks])[0])

    def report_evaluation(self, record: Record) -> None:
        """One evaluation, on console and in metrics.jsonl."""
        if self._reporter is not None:
            self._reporter.evaluation(record)

    def save(self, chunks: Chunks, updater: Updater, *, steps_done: int, samples_done: int) -> Path:
        """Write a checkpoint of what all ranks hold, each tensor once."""
        path = save_checkpoint(
            self.path / CHECKPOINTS,
            steps_done,
            held_rectangles(chunks, updater, self._config.optimizer.name, self._mesh),
            facts={**self._facts(chunks, samples_done), **facts_of(updater)},
            attachments={tokenizer_name(self._config): self.path / tokenizer_name(self._config)},
            rank=self._environment.rank,
            world_size=self._environment.world_size,
            agree=self._first_text,
            keep_last=self._config.run.keep_last,
        )
        self.say(f"checkpoint {path}")
        return path

    def _first_text(self, text: str | None) -> str | None:
        told = self._agreement.first(text)
        return None if told is None else told.text

    def _facts(self, chunks: Chunks, samples: int) -> Mapping[str, JSON]:
        return {
            MODEL: asdict(chunks.shape),
            SETTINGS: cast(JSON, to_dict(self._config)),
            LOWERCASE: self._config.data.lowercase,
            SAMPLES: samples,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }


def prepare(config: Config, environment: LaunchEnvironment, agreement: Agreement) -> None:
    """Make the folder and keep settings and tokenizer in it; the other ranks wait for it."""
    with together(agreement):
        if environment.is_first:
            path = Path(config.run.directory)
            if path.exists() and not path.is_dir():
                raise TrainingError(f"run.directory ({path}) is a file; choose a folder, new or of the same run")
            path.mkdir(parents=True, exist_ok=True)
            write_config(config, path / "config.yaml")
            shutil.copyfile(config.data.tokenizer, path / tokenizer_name(config))


def tokenizer_name(config: Config) -> str:
    """Name under which the tokenizer goes along with a run and its checkpoints."""
    return "tokenizer.json" if Path(config.data.tokenizer).suffix == ".json" else "vocab.txt"
