"""The weights that a task begins with, or that are measured: whether they fit, and what their labels are."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from megatron_bert_tp.checkpoint.directories import find_checkpoint
from megatron_bert_tp.checkpoint.manifest import MANIFEST
from megatron_bert_tp.config.problems import report
from megatron_bert_tp.config.task_rules import model_problems
from megatron_bert_tp.config.task_schema import TaskConfig, TaskRun
from megatron_bert_tp.errors import ConfigError
from megatron_bert_tp.formats.huggingface_config import CONFIG
from megatron_bert_tp.formats.weights import ModelSource
from megatron_bert_tp.model.shape import ModelShape
from megatron_bert_tp.tasks.labels import Labels, labels_from_names, labels_of
from megatron_bert_tp.tasks.task import PROBLEM_TYPES, TASKS, Kind

_END = 1 << 20  # bytes


def check_start(config: TaskRun, source: ModelSource, path: Path) -> None:
    """ConfigError where the weights are no encoder, or do not fit the settings."""
    if source.shape.is_decoder:
        raise ConfigError(
            f"{path}: is a decoder (is_decoder), which sees no words to the right; tasks need an encoder: set "
            "is_decoder to false in its config.json if it was trained as one, or give other weights"
        )
    problems = model_problems(config, asdict(source.shape))
    if problems:
        raise ConfigError(report(problems, f"this run, which begins with {path}"))


def has_head_of(source: ModelSource, given: TaskConfig, labels: Labels | None) -> bool:
    """Whether the weights have a head for this very task: class, kind of problem, labels in their order."""
    task = TASKS[given.name]
    if source.head.architecture != task.architecture:
        return False
    if source.settings.get("problem_type") not in (None, PROBLEM_TYPES.get(task.kind)):
        return False
    if task.kind is Kind.NUMBER:
        return source.shape.num_labels == 1
    return labels is None or _names_in(source) == labels.names


def labels_of_model(config: TaskRun, source: ModelSource, path: Path) -> Labels | None:
    """Labels of a model that has learned the task, or what the settings say."""
    task = TASKS[config.task.name]
    if source.head.architecture != task.architecture:
        raise ConfigError(
            f"{path}: is a {source.head.architecture}, but task.name = {config.task.name!r} is measured with a "
            f"{task.architecture}; give the folder that fine-tuning on this task has written"
        )
    told, wanted = source.settings.get("problem_type"), PROBLEM_TYPES.get(task.kind)
    if told not in (None, wanted):
        raise ConfigError(
            f"{path}: has learned a {told}, but task.name = {config.task.name!r} is a {wanted}; give a model that "
            "has learned this task"
        )
    if task.kind in (Kind.NUMBER, Kind.CHOICE, Kind.ANSWER):
        if task.kind is Kind.NUMBER and source.shape.num_labels != 1:
            raise ConfigError(
                f"{path}: has {source.shape.num_labels} outputs, but task.name = {config.task.name!r} is one "
                "number; give a model that has learned this task"
            )
        return None
    names = _names_in(source)
    if not names or (_are_made_up(names) and (config.task.labels or task.labels)):
        labels = labels_of(config.task, None)
        names = () if labels is None else labels.names
    elif config.task.labels not in (None, names):
        raise ConfigError(
            f"{path}: its labels are {', '.join(names)}; leave task.labels out, or give them in this order"
        )
    if len(names) != source.shape.num_labels:
        raise ConfigError(
            f"{path}: the model has {source.shape.num_labels} labels, but the task has {len(names)}: "
            f"{', '.join(names)}; set task.labels to those of the model, in the order of their numbers"
        )
    return labels_from_names(names)


def _names_in(source: ModelSource) -> tuple[str, ...]:
    """Names of the labels by number, as the model has them."""
    named = source.settings.get("id2label")
    if not isinstance(named, Mapping):
        return ()
    return tuple(str(named.get(str(number))) for number in range(len(named)))


def _are_made_up(names: tuple[str, ...]) -> bool:
    """Whether they are what `transformers` calls labels that nobody has named."""
    return names == tuple(f"LABEL_{number}" for number in range(len(names)))


def sizes_fingerprint(shape: ModelShape) -> str:
    """What tells the beginning of a run from others that takes no more than sizes."""
    return hashlib.sha256(repr(asdict(shape)).encode()).hexdigest()


def weights_fingerprint(path: Path) -> str:
    """What tells the weights of a folder from others: SHA-256 over sizes and both ends of its files of tensors.

    Of a checkpoint its manifest says all.  Whole files are not read, which for large models takes minutes.
    """
    digest = hashlib.sha256()
    if (path / CONFIG).is_file():
        files = sorted(file for pattern in ("*.safetensors", "*.bin") for file in path.glob(pattern))
    else:
        files = [find_checkpoint(path) / MANIFEST]
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            digest.update(content.read(_END))
            content.seek(max(0, size - _END))
            digest.update(content.read(_END))
    return digest.hexdigest()
