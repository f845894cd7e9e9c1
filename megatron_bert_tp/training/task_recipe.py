"""From the settings of a task, its data and its weights to a recipe and an objective; pure functions."""

from collections.abc import Mapping
from dataclasses import fields, replace
from math import ceil
from pathlib import Path

import numpy as np

from megatron_bert_tp.checkpoint.durable import JSON
from megatron_bert_tp.checkpoint.model import ARCHITECTURE
from megatron_bert_tp.config.schema import OptimizerConfig, UpdateConfig
from megatron_bert_tp.config.task_schema import TaskOptimizerConfig, TaskRun
from megatron_bert_tp.formats.huggingface_config import LABELS
from megatron_bert_tp.formats.task_folder import model_folder
from megatron_bert_tp.formats.weights import HUGGINGFACE
from megatron_bert_tp.model.shape import HEADS, Head, ModelShape
from megatron_bert_tp.objectives.label_losses import CrossEntropy
from megatron_bert_tp.objectives.tasks import TaskObjective, terms_of
from megatron_bert_tp.parallel.cross_entropy import IGNORED
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.pipeline.partition import partition
from megatron_bert_tp.tasks.labels import Labels
from megatron_bert_tp.tasks.task import PROBLEM_TYPES, TASKS
from megatron_bert_tp.training.recipe import Recipe
from megatron_bert_tp.training.task_data import TaskData, TaskPart, learned_fingerprint
from megatron_bert_tp.training.task_start import has_head_of

_EPOCHS = 3.0
"""Where neither epochs nor steps are given."""


def head_of_task(config: TaskRun) -> Head:
    """What stands on the encoder."""
    return HEADS[TASKS[config.task.name].architecture]


def task_recipe(config: TaskRun, data: TaskData) -> Recipe:
    """Recipe of fine-tuning, or of an evaluation where there is nothing to learn from."""
    start, source = config.model, data.source
    shape = _shape(config, source.shape, data.num_outputs)
    num_samples = data.training.table.num_samples if data.training else config.optimizer.global_batch
    return Recipe(
        given=config,
        optimizer=optimizer_of(config.optimizer, num_samples),
        parallel=config.parallel,
        run=config.run,
        shape=shape,
        head=head_of_task(config),
        plans=partition(shape.num_hidden_layers, config.parallel.pipeline * config.parallel.virtual),
        tokenizer_files=source.tokenizer_files,
        lowercase=source.lowercase,
        fingerprints=() if data.training is None else (learned_fingerprint(data.training, data.labels),),
        weights=None if start.random_weights else model_folder(Path(start.weights)),
        start=data.start,
        takes_head=has_head_of(source, config.task, data.labels),
        facts=_facts(config, data),
        layer_decay=config.optimizer.layer_decay,
        frozen_layers=start.frozen_layers,
    )


def optimizer_of(given: TaskOptimizerConfig, num_samples: int) -> OptimizerConfig:
    """Settings in steps, for so many samples an epoch."""
    shared = {field.name: getattr(given, field.name) for field in fields(UpdateConfig) if field.name != "steps"}
    steps = given.steps or max(1, ceil(round(num_samples * (given.epochs or _EPOCHS), 6) / given.global_batch))
    return OptimizerConfig(
        **shared, steps=steps, schedule=given.schedule, warmup_steps=round(given.warmup_share * steps)
    )


def steps_between_evaluations(config: TaskRun, num_samples: int) -> int:
    """Those that the settings say, else an epoch."""
    return config.run.evaluate_every or max(1, ceil(num_samples / config.optimizer.global_batch))


def task_objective(config: TaskRun, recipe: Recipe, data: TaskData, tensor: Axis) -> TaskObjective:
    """What is minimised."""
    task = TASKS[config.task.name]
    weights = config.task.class_weights
    if config.task.balanced and data.training is not None and data.labels is not None:
        weights = balanced_weights(data.training, data.labels)
    return TaskObjective(
        terms_of(
            recipe.head,
            recipe.shape,
            tensor=tensor,
            problem_type=PROBLEM_TYPES.get(task.kind),
            classes=CrossEntropy(config.task.label_smoothing, weights),
        )
    )


def balanced_weights(part: TaskPart, labels: Labels) -> tuple[float, ...]:
    """``n / (classes x n of the class)``, King and Zeng 2001; 0 for a class that nothing has."""
    assert part.table.labels is not None
    numbers = part.table.labels[part.table.labels != IGNORED].astype(np.int64)
    counts = np.bincount(numbers, minlength=len(labels.names))
    return tuple(len(numbers) / (len(counts) * count) if count else 0.0 for count in counts.tolist())


def _shape(config: TaskRun, shape: ModelShape, num_labels: int) -> ModelShape:
    given = {
        name: value
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")
        if (value := getattr(config.model, name)) is not None
    }
    return replace(shape, num_labels=num_labels, **given)


def _facts(config: TaskRun, data: TaskData) -> Mapping[str, JSON]:
    """Class, labels and kind of problem, as an export of the run writes them into config.json."""
    settings: dict[str, JSON] = {
        name: value for name, value in data.source.settings.items() if name not in (*LABELS, "problem_type")
    }
    kind = TASKS[config.task.name].kind
    if kind in PROBLEM_TYPES:
        settings["problem_type"] = PROBLEM_TYPES[kind]
    if data.labels is not None:
        settings["id2label"] = {str(number): name for number, name in enumerate(data.labels.names)}
        settings["label2id"] = {name: number for number, name in enumerate(data.labels.names)}
    return {ARCHITECTURE: head_of_task(config).architecture, HUGGINGFACE: settings}
