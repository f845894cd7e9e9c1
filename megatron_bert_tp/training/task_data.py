"""The data side of a task: its files, its labels, the tokenizer of the weights, and the tables of samples."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from megatron_bert_tp.config.problems import report
from megatron_bert_tp.config.task_rules import model_problems
from megatron_bert_tp.config.task_schema import TaskConfig, TaskRun
from megatron_bert_tp.data.packing import Cutting
from megatron_bert_tp.data.samples.sampler import SampleOrder
from megatron_bert_tp.errors import ConfigError, DataError
from megatron_bert_tp.formats.weights import ModelSource, open_encoder_weights
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.tasks.batches import TaskBatches
from megatron_bert_tp.tasks.examples import Example
from megatron_bert_tp.tasks.feature_table import FeatureTable
from megatron_bert_tp.tasks.features import features_of
from megatron_bert_tp.tasks.labels import Labels, labels_from_names, labels_of
from megatron_bert_tp.tasks.metrics import check_libraries
from megatron_bert_tp.tasks.reading.read import read_examples
from megatron_bert_tp.tasks.scoring import may_be_unanswerable
from megatron_bert_tp.tasks.task import TASKS, Kind
from megatron_bert_tp.text.encoder import open_encoder

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
    labels: Labels | None
    training: TaskPart | None
    validation: TaskPart | None
    test: TaskPart | None

    def task(self, given: TaskConfig) -> TaskConfig:
        """The settings of the task, with what the data says: whether questions may have no answer."""
        if TASKS[given.name].kind is not Kind.ANSWER or given.unanswerable is not None:
            return given
        known = [example for part in (self.training, self.validation) if part for example in part.examples]
        return replace(given, unanswerable=may_be_unanswerable(given, known))

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
    path = Path(config.model.weights)
    source = open_encoder_weights(path, verify=verifies)
    _check_model(config, source, path)
    encoder = open_encoder(source, path)
    files = config.data
    training = _examples(config, files.train, "training", say=say) if learns else None
    labels = labels_of(config.task, training) if learns else _known_labels(config, source, path)
    if training is not None and files.most_train is not None:
        training = _drawn(training, files.most_train, files.draw)

    def part(examples: Sequence[Example] | None, name: str) -> TaskPart | None:
        if examples is None:
            return None
        table = features_of(
            examples, encoder, config.task, labels=labels, sequence_length=files.sequence_length
        )
        say("\n".join(_told(name, examples, table, files.sequence_length)))
        return TaskPart(tuple(examples), table)

    return TaskData(
        source,
        labels,
        part(training, "training"),
        part(_examples(config, files.validation, "validation", say=say), "validation"),
        part(_examples(config, files.test, "test", say=say), "test"),
    )


def batches_of(
    part: TaskPart, config: TaskRun, source: ModelSource, data: Axis, *, seed: int, sizes: Callable[[int], int]
) -> TaskBatches:
    """Microbatches of one replica; ``sizes`` tells the samples of the step that follows so many."""
    parallel = config.parallel
    size = parallel.microbatch if parallel.packing == "none" else parallel.microbatch_tokens
    assert size is not None, "the rules of the settings ask for the one that packing needs"
    return TaskBatches(
        part.table,
        source.shape.pad_token_id,
        sequence_length=min(config.data.sequence_length, source.shape.max_position_embeddings),
        seed=seed,
        size_of=sizes,
        cutting=Cutting(packing=parallel.packing, size=size, data_rank=data.rank, data_size=data.size),
    )


def fingerprint(part: TaskPart) -> str:
    """What tells the samples of a part from others: SHA-256 of tokens and labels."""
    digest = hashlib.sha256()
    for array in (part.table.ids, part.table.bounds, part.table.labels):
        if array is not None:
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _check_model(config: TaskRun, source: ModelSource, path: Path) -> None:
    if source.shape.is_decoder:
        raise ConfigError(
            f"{path}: is a decoder (is_decoder), which sees no words to the right; tasks need an encoder: set "
            "is_decoder to false in its config.json if it was trained as one, or give other weights"
        )
    problems = model_problems(config, asdict(source.shape))
    if problems:
        raise ConfigError(report(problems, f"this run, which begins with {path}"))


def _examples(
    config: TaskRun, files: tuple[str, ...] | None, name: str, *, say: Say
) -> tuple[Example, ...] | None:
    if files is None:
        return None
    reading = read_examples(config.task, [Path(file) for file in files], is_labelled=name != "test")
    for note in reading.notes:
        say(f"{name}: {note}")
    return reading.examples


def _known_labels(config: TaskRun, source: ModelSource, path: Path) -> Labels | None:
    """Labels of a model that has learned the task, or what the settings say."""
    task = TASKS[config.task.name]
    if source.head.architecture != task.architecture:
        raise ConfigError(
            f"{path}: is a {source.head.architecture}, but task.name = {config.task.name!r} is measured with a "
            f"{task.architecture}; give the folder that fine-tuning on this task has written"
        )
    if task.kind in (Kind.NUMBER, Kind.CHOICE, Kind.ANSWER):
        return None
    named = source.settings.get("id2label")
    labels: Labels | None
    if config.task.labels is None and isinstance(named, dict):
        labels = labels_from_names(str(named[str(number)]) for number in range(len(named)))
    else:
        labels = labels_of(config.task, None)
    if labels is not None and len(labels.names) != source.shape.num_labels:
        raise DataError(
            f"{path}: the model has {source.shape.num_labels} labels, but the task has {len(labels.names)}: "
            f"{', '.join(labels.names)}; set task.labels to those of the model, in the order of their numbers"
        )
    return labels


def _drawn(examples: tuple[Example, ...], most: int, seed: int) -> tuple[Example, ...]:
    """At most ``most`` of the examples, drawn by ``seed``, in their order."""
    if most >= len(examples):
        return examples
    places = SampleOrder(len(examples), seed).spans(np.arange(most))
    return tuple(examples[place] for place in sorted(places.tolist()))


def _told(name: str, examples: Sequence[Example], table: FeatureTable, longest: int) -> Iterator[str]:
    many = "" if table.num_samples == len(examples) else f", {table.num_samples:,} samples"
    yield f"{name}: {len(examples):,} examples{many}, {len(table.ids):,} tokens"
    if table.truncated:
        yield (
            f"{name}: {table.truncated:,} samples are longer than data.sequence_length ({longest}) and lose "
            "their last tokens"
        )
