"""The data side of a task: its files, its labels, the tokenizer of the weights, and the tables of samples."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np

from megatron_bert_tp.config.problems import counted
from megatron_bert_tp.config.task_schema import TaskConfig, TaskRun
from megatron_bert_tp.data.packing import Cutting
from megatron_bert_tp.data.samples.sampler import SampleOrder
from megatron_bert_tp.errors import ConfigError, DataError
from megatron_bert_tp.formats.task_folder import model_folder
from megatron_bert_tp.formats.weights import ModelSource, open_encoder_weights, open_sizes
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.tasks.batches import TaskBatches
from megatron_bert_tp.tasks.examples import AnswerExample, Example
from megatron_bert_tp.tasks.feature_table import FeatureTable
from megatron_bert_tp.tasks.features import features_of
from megatron_bert_tp.tasks.labels import Labels, labels_of
from megatron_bert_tp.tasks.metrics import check_libraries
from megatron_bert_tp.tasks.reading.parts import Part
from megatron_bert_tp.tasks.reading.read import read_examples
from megatron_bert_tp.tasks.scoring import may_be_unanswerable
from megatron_bert_tp.tasks.task import TASKS, Kind
from megatron_bert_tp.text.encoder import open_encoder
from megatron_bert_tp.training.task_start import (
    check_start,
    has_head_of,
    labels_of_model,
    sizes_fingerprint,
    weights_fingerprint,
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class TaskPart:
    """Training, validation or test: the examples and what the model reads of them."""

    examples: tuple[Example, ...]
    table: FeatureTable


@dataclass(frozen=True)
class TaskData:
    """Everything that a run on a task reads."""

    source: ModelSource
    """The weights that it begins with."""
    start: str
    """Fingerprint of them."""
    labels: Labels | None
    training: TaskPart | None
    validation: TaskPart | None
    test: TaskPart | None

    def task(self, given: TaskConfig) -> TaskConfig:
        """The settings of the task, with what the data says: whether questions may have no answer."""
        if TASKS[given.name].kind is not Kind.ANSWER or given.unanswerable is not None:
            return given
        parts = (self.training, self.validation) if self.training or self.validation else (self.test,)
        known = [example for part in parts if part for example in part.examples]
        return replace(given, unanswerable=may_be_unanswerable(given, known))

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """What tells the weights and each part from others, by their settings."""
        parts = {"data.train": self.training, "data.validation": self.validation, "data.test": self.test}
        told = {path: fingerprint(part, self.labels) for path, part in parts.items() if part is not None}
        return {"model.weights": self.start, **told}

    @cached_property
    def measured_on(self) -> str:
        """What tells the validation part from others on which other metrics would come out; empty without one."""
        if self.validation is None:
            return ""
        # By the ids only predictions are called.
        nameless = tuple(replace(example, id="") for example in self.validation.examples)
        return fingerprint(replace(self.validation, examples=nameless), self.labels)

    @property
    def num_outputs(self) -> int:
        """``num_labels`` of the model."""
        if self.labels is not None:
            return len(self.labels.names)
        part = next(part for part in (self.training, self.validation, self.test) if part is not None)
        return 1 if part.table.kind is Kind.NUMBER else 2


def open_task_data(config: TaskRun, *, verifies: bool, learns: bool, say: Say) -> TaskData:
    """Read and check all files that ``config`` names; every rank does it by itself.

    ``verifies`` is set on the rank that compares a checkpoint with its SHA-256; ``learns`` where the task is
    trained, and not where a model that has learned it is evaluated: its labels are then the model's.
    """
    check_libraries(TASKS[config.task.name].kind)
    path = model_folder(Path(config.model.weights))
    is_random = learns and config.model.random_weights
    source = (open_sizes if is_random else open_encoder_weights)(path, verify=verifies)
    check_start(config, source, path)
    encoder = open_encoder(source, path)
    files = config.data
    training = _examples(config, files.train, "training", say=say) if learns else None
    labels = labels_of(config.task, training) if learns else labels_of_model(config, source, path)
    if training is not None and files.most_train is not None:
        training = _drawn(training, files.most_train, files.draw)

    def part(examples: Sequence[Example] | None, name: Part) -> TaskPart | None:
        if examples is None:
            return None
        table = features_of(
            examples, encoder, config.task, labels=labels, sequence_length=files.sequence_length
        )
        say("\n".join(_told(name, examples, table, labels=labels, longest=files.sequence_length)))
        return TaskPart(tuple(examples), table)

    _check_weights_of_classes(config, labels)
    data = TaskData(
        source,
        sizes_fingerprint(source.shape) if is_random else weights_fingerprint(path),
        labels,
        part(training, "training"),
        part(_examples(config, files.validation, "validation", say=say), "validation"),
        part(_examples(config, files.test, "test", say=say), "test"),
    )
    _check_answers(config, data)
    if learns and not is_random and has_head_of(source, config.task, labels):
        say(f"begins with the head of {path} too: it is for the same labels")
    return data


def batches_of(
    part: TaskPart, config: TaskRun, source: ModelSource, data: Axis, *, seed: int
) -> TaskBatches:
    """Microbatches of one replica."""
    parallel = config.parallel
    size = parallel.microbatch if parallel.packing == "none" else parallel.microbatch_tokens
    assert size is not None, "the rules of the settings ask for the one that packing needs"
    return TaskBatches(
        part.table,
        source.shape.pad_token_id,
        sequence_length=min(config.data.sequence_length, source.shape.max_position_embeddings),
        seed=seed,
        global_batch=config.optimizer.global_batch,
        cutting=Cutting(packing=parallel.packing, size=size, data_rank=data.rank, data_size=data.size),
    )


def learned_fingerprint(part: TaskPart, labels: Labels | None) -> str:
    """What tells the samples of a part from others: SHA-256 of tokens, labels and the names of these."""
    digest = hashlib.sha256(repr(() if labels is None else labels.names).encode())
    for array in (part.table.ids, part.table.bounds, part.table.labels):
        if array is not None:
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def fingerprint(part: TaskPart, labels: Labels | None) -> str:
    """What tells all that is measured or written of a part from others: its samples, ids, texts and answers."""
    digest = hashlib.sha256(learned_fingerprint(part, labels).encode())
    for example in part.examples:
        digest.update(repr(replace(example, place="")).encode())
    return digest.hexdigest()


def _examples(
    config: TaskRun, files: tuple[str, ...] | None, part: Part, *, say: Say
) -> tuple[Example, ...] | None:
    if files is None:
        return None
    reading = read_examples(config.task, [Path(file) for file in files], part=part)
    for note in reading.notes:
        say(f"{part}: {note}")
    return reading.examples


def _check_weights_of_classes(config: TaskRun, labels: Labels | None) -> None:
    weights = config.task.class_weights
    if weights is not None and labels is not None and len(weights) != len(labels.names):
        raise ConfigError(
            f"task.class_weights has {counted(len(weights), 'weight')}, but there are {len(labels.names)} "
            f"classes: {', '.join(labels.names)}; give a weight for each, in this order"
        )


def _check_answers(config: TaskRun, data: TaskData) -> None:
    """DataError, before hours of training, for questions that cannot be measured after it."""
    if TASKS[config.task.name].kind is not Kind.ANSWER or data.task(config.task).unanswerable:
        return
    for part in (data.validation, data.test):
        for example in () if part is None else cast(tuple[AnswerExample, ...], part.examples):
            if example.is_labelled and not example.answers:
                raise DataError(
                    f"{example.place}: has no answer, but all questions that are learned from have one; set "
                    "task.unanswerable=true, or false to pass such questions over"
                )


def _drawn(examples: tuple[Example, ...], most: int, seed: int) -> tuple[Example, ...]:
    """At most ``most`` of the examples, drawn by ``seed``, in their order."""
    if most >= len(examples):
        return examples
    places = SampleOrder(len(examples), seed).spans(np.arange(most))
    return tuple(examples[place] for place in sorted(places.tolist()))


def _told(
    name: Part, examples: Sequence[Example], table: FeatureTable, *, labels: Labels | None, longest: int
) -> Iterator[str]:
    counts = [counted(len(examples), "example")]
    if labels is not None and name == "training":
        named = ("tag", "tags") if table.kind is Kind.TAGS else ("class", "classes")
        counts.append(counted(len(labels.names), *named))
    if table.num_samples != len(examples):
        counts.append(counted(table.num_samples, "sample"))
    yield f"{name}: {', '.join(counts)}, {counted(len(table.ids), 'token')}"
    if table.truncated:
        longer = f"longer than data.sequence_length ({longest})"
        lost = f"sample is {longer} and loses its last tokens", f"samples are {longer} and lose their last tokens"
        yield f"{name}: {counted(table.truncated, *lost)}"
