"""The folder of a run: settings, metrics and checkpoints, and where a run goes on."""

import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch

from megatron_bert_tp.checkpoint.directories import latest_checkpoint
from megatron_bert_tp.checkpoint.durable import JSON
from megatron_bert_tp.checkpoint.model import MODEL
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.checkpoint.save import save_checkpoint
from megatron_bert_tp.checkpoint.slices import rectangles
from megatron_bert_tp.config.dump import to_dict, write_config
from megatron_bert_tp.config.environment import LaunchEnvironment
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.errors import CheckpointError
from megatron_bert_tp.formats.convert import LOWERCASE
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.optim.adamw import MOMENTS, moment_of
from megatron_bert_tp.parallel.mesh import ParallelMesh
from megatron_bert_tp.training.processes import barrier
from megatron_bert_tp.training.progress import Record, Reporter

CHECKPOINTS = "checkpoints"


class RunDirectory:
    """What one rank writes into ``run.directory``; only the first rank has a reporter."""

    def __init__(
        self, config: Config, environment: LaunchEnvironment, mesh: ParallelMesh, reporter: Reporter | None
    ) -> None:
        self._config, self._environment, self._mesh, self._reporter = config, environment, mesh, reporter
        self.path = Path(config.run.directory)

    def say(self, text: str) -> None:
        """One line on the console, from the first rank."""
        if self._reporter is not None:
            self._reporter.say(text)

    def report_step(self, record: Record) -> None:
        """One optimizer step, on console and in metrics.jsonl."""
        if self._reporter is not None:
            self._reporter.step(record)

    def report_evaluation(self, record: Record) -> None:
        """One evaluation, on console and in metrics.jsonl."""
        if self._reporter is not None:
            self._reporter.evaluation(record)

    def save(
        self, stage: MegatronBertStage, optimizer: torch.optim.AdamW, steps_done: int, global_batch: int
    ) -> Path:
        """Write a checkpoint; one replica writes, since all hold the same."""
        held = []
        if self._mesh.data.is_first:
            parts = stage.parts()
            held = rectangles(parts, "weight", lambda part: part.parameter)
            for kind in MOMENTS:
                held += rectangles(parts, kind, moment_of(optimizer, kind))
        path = save_checkpoint(
            self.path / CHECKPOINTS,
            steps_done,
            held,
            facts=self._facts(stage, steps_done * global_batch),
            attachments=self._tokenizer_file(),
            rank=self._environment.rank,
            world_size=self._environment.world_size,
            barrier=barrier,
            keep_last=self._config.run.keep_last,
        )
        self.say(f"checkpoint {path}")
        return path

    def _tokenizer_file(self) -> dict[str, Path]:
        """The tokenizer goes along, so that a checkpoint can be exported by itself."""
        path = Path(self._config.data.tokenizer)
        return {"tokenizer.json" if path.suffix == ".json" else "vocab.txt": path}

    def _facts(self, stage: MegatronBertStage, samples: int) -> Mapping[str, JSON]:
        return {
            MODEL: asdict(stage.shape),
            "settings": cast(JSON, to_dict(self._config)),
            LOWERCASE: self._config.data.lowercase,
            "samples": samples,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }


def prepare(config: Config, environment: LaunchEnvironment) -> None:
    """Make the folder and keep the settings in it; the other ranks wait for it."""
    if environment.is_first:
        path = Path(config.run.directory)
        path.mkdir(parents=True, exist_ok=True)
        write_config(config, path / "config.yaml")
    barrier()


def checkpoint_to_resume(config: Config, environment: LaunchEnvironment) -> Checkpoint | None:
    """What ``run.resume`` names, its files verified by the first rank."""
    checkpoint = _named_checkpoint(config)
    if checkpoint is not None and environment.is_first:
        checkpoint.verify()
    return checkpoint


def _named_checkpoint(config: Config) -> Checkpoint | None:
    """The newest checkpoint of the folder, none, or the one at the path that ``run.resume`` gives."""
    checkpoints = Path(config.run.directory) / CHECKPOINTS
    newest = latest_checkpoint(checkpoints)
    if config.run.resume == "auto":
        return Checkpoint.open(newest) if newest else None
    if config.run.resume != "never":
        return Checkpoint.open(Path(config.run.resume))
    if newest:
        raise CheckpointError(
            f"run.resume is never, but {checkpoints} already holds {newest.name}, which a new run would replace; "
            "choose another run.directory, or go on with run.resume=auto"
        )
    return None
