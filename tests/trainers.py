"""The trainer of `pretrain` on any layout: over the corpus of the tests, or over microbatches made by hand."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from megatron_bert_tp.config.environment import LaunchEnvironment
from megatron_bert_tp.config.load import load_config
from megatron_bert_tp.config.schema import Config, ModelConfig
from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.model.shape import ModelShape
from megatron_bert_tp.objectives.pretraining import Counts, Losses
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.training.build import build_pretrainer
from megatron_bert_tp.training.evaluation import HeldOut
from megatron_bert_tp.training.pretraining import pretrain
from megatron_bert_tp.training.texts import open_texts
from megatron_bert_tp.training.trainer import Trainer
from tests.comparison import StepRecord, own_piece, weight_pieces
from tests.support import (
    CPU,
    LENGTHS,
    ODD_SHAPE,
    TIMEOUT,
    Layout,
    Recipe,
    batches_of_step,
    build_mesh,
    load_whole_,
    with_dropout,
)

# 101 words divide by no tensor size, and the 99 of the tokenizer lie on every tensor rank.
CORPUS_SHAPE = with_dropout(replace(ODD_SHAPE, vocab_size=101))
MADE_SAMPLES = sum(map(len, LENGTHS))


class MadeBatches:
    """Stands for `PretrainingBatches` of a single replica: the microbatches of `batches_of_step`."""

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape

    def take(self, samples_done: int) -> list[Batch]:
        step, rest = divmod(samples_done, MADE_SAMPLES)
        assert rest == 0
        return batches_of_step(step, shape=self._shape)


def configure(settings: Path, recipe: Recipe, layout: Layout, *overrides: str) -> Config:
    """Settings of the tests with those of ``recipe`` and ``layout`` over them, and ``overrides`` last."""
    settable = {field.name for field in fields(ModelConfig)}
    values = {f"model.{name}": value for name, value in asdict(recipe.shape).items() if name in settable}
    values |= {
        "data.sequence_length": min(24, recipe.shape.max_position_embeddings),
        "optimizer.precision": str(recipe.dtype).removeprefix("torch."),
        "optimizer.seed": recipe.seed,
        "optimizer.steps": recipe.num_steps,
        "optimizer.learning_rate": recipe.rate,
        "optimizer.final_learning_rate": recipe.final_rate,
        "optimizer.warmup_steps": 0,
        "optimizer.clip_norm": recipe.clip_norm,
        "parallel.pipeline": layout.pipeline,
        "parallel.tensor": layout.tensor,
        "parallel.schedule": layout.schedule,
        "parallel.virtual": layout.virtual,
        "parallel.sequence": layout.sequence,
        "parallel.shard_optimizer": layout.shards,
        "parallel.overlap_messages": layout.overlaps,
        "parallel.recompute": layout.recompute,
        "parallel.recompute_every": layout.every,
        # Small, so that there are many to send while the backward runs.
        "parallel.bucket_megabytes": 1,
    }
    if layout.packing != "none":
        values |= {"parallel.packing": layout.packing, "parallel.microbatch_tokens": 64}
    given = [f"{path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in values.items()]
    return load_config(settings, [*given, *overrides], world_size=layout.world)


def trainer_of(config: Config, layout: Layout) -> Trainer:
    """New trainer of this rank over the corpus, as `pretrain` builds it."""
    mesh = build_mesh(layout)
    texts = open_texts(config, mesh.data, say=print)
    return build_pretrainer(config, mesh, texts, agreement=Agreement.of_world(TIMEOUT), device=CPU)


def trainer_of_made(
    settings: Path, recipe: Recipe, layout: Layout, weights: Mapping[str, Tensor] | None = None
) -> Trainer:
    """New trainer of this rank over microbatches made by hand, from the seed or from whole weights."""
    assert layout.data == 1
    sizes = f"optimizer.global_batch={MADE_SAMPLES}", "parallel.microbatch=1"
    config = configure(settings, recipe, layout, *sizes)
    mesh = build_mesh(layout)
    texts = SimpleNamespace(training=MadeBatches(recipe.shape), validation=None)
    trainer = build_pretrainer(config, mesh, texts, agreement=Agreement.of_world(TIMEOUT), device=CPU)
    if weights is not None:
        for stage in trainer.chunks:
            load_whole_(stage, weights)
    return trainer


def steps_of(trainer: Trainer, num_steps: int) -> list[StepRecord]:
    """What this rank holds after each of the next steps."""
    records = []
    for _ in range(num_steps):
        report = trainer.train_step()
        gradients = [own_piece(part, gradient) for part, gradient in trainer.updater.gradients.own]
        weights = weight_pieces(trainer.chunks.parts())
        records.append(StepRecord(report.losses, report.update.grad_norm, gradients, weights))
    return records


def train(settings: Path, recipe: Recipe, layout: Layout, *overrides: str) -> list[StepRecord]:
    """Whole training of one rank over the corpus: a function that the pool runs."""
    return steps_of(trainer_of(configure(settings, recipe, layout, *overrides), layout), recipe.num_steps)


def train_on_made(
    settings: Path, recipe: Recipe, layout: Layout, weights: Mapping[str, Tensor] | None = None
) -> list[StepRecord]:
    """The same over microbatches made by hand."""
    return steps_of(trainer_of_made(settings, recipe, layout, weights), recipe.num_steps)


def evaluate(settings: Path, recipe: Recipe, layout: Layout, *overrides: str) -> tuple[int, Losses, Counts]:
    """Microbatches of this rank, and the losses on the held-out part before the first step."""
    config = configure(settings, recipe, layout, *overrides)
    trainer = trainer_of(config, layout)
    texts, num_samples = open_texts(config, trainer.mesh.data, say=print), config.run.evaluation_samples
    assert texts.validation is not None
    num_microbatches = len(texts.validation.evaluation(num_samples))
    losses, counts = HeldOut(texts, num_samples=num_samples, every=1, last_step=1).losses(trainer)
    assert trainer.chunks.is_training, "dropout is back on"
    assert all(parameter.grad is None for stage in trainer.chunks for parameter in stage.parameters())
    return num_microbatches, losses, counts


def run(settings: Path, recipe: Recipe, layout: Layout, *overrides: str) -> None:
    """A whole run of one rank, with its folder; the pool has made the process group already."""
    config = configure(settings, recipe, layout, *overrides)
    environment = LaunchEnvironment(rank=dist.get_rank(), world_size=dist.get_world_size())
    with patch("megatron_bert_tp.training.session.process_group", lambda *_: nullcontext()):
        pretrain(config, environment)
