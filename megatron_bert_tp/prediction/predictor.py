"""A task on a model: samples in, records out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from megatron_bert_tp.checkpoint.durable import JSON
from megatron_bert_tp.errors import ConfigError, DataError, FormatError
from megatron_bert_tp.family import models
from megatron_bert_tp.family.base import PretrainedModel
from megatron_bert_tp.family.config import MegatronBertConfig
from megatron_bert_tp.family.files import WORDS
from megatron_bert_tp.formats.number_formats import converting, dtype_of
from megatron_bert_tp.formats.weights import ModelSource
from megatron_bert_tp.model.shape import tensor_shapes
from megatron_bert_tp.parallel.mesh import ParallelMesh
from megatron_bert_tp.prediction.answers import Record
from megatron_bert_tp.prediction.arguments import Options
from megatron_bert_tp.prediction.batches import Batch, by_length, shared
from megatron_bert_tp.prediction.heads import Output, Setup, compute
from megatron_bert_tp.prediction.samples import Sample, read_line
from megatron_bert_tp.prediction.tasks import TASKS, Task, tasks_of
from megatron_bert_tp.text.encoder import Row, open_encoder


@dataclass(frozen=True)
class Question:
    """A sample and its rows of the model's input."""

    sample: Sample
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Predictor:
    """One model, whole or this rank's share of it, and one task.

    The first rank of the tensor axis asks (`answers`, then `finish`), while the others are in `follow`.
    """

    model: PretrainedModel
    task: Task
    setup: Setup
    batch_size: int = 32

    @classmethod
    def open(
        cls,
        path: Path,
        task: str,
        *,
        options: Options | None = None,
        batch_size: int = 32,
        mesh: ParallelMesh | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Predictor":
        """Model of a Hugging Face directory, a checkpoint or a run, as it is there: no tensor is made up.

        ``dtype`` is that of the files unless given.  ConfigError when the class has no head for the task;
        FormatError or CheckpointError when the path holds no model, or no tokenizer.
        """
        source = ModelSource.open(path)
        architecture = source.head.architecture
        if architecture not in TASKS[task].classes:
            raise ConfigError(
                f"{path}: {task} needs a {TASKS[task].classes[0]}, and this is a {architecture}, which can do "
                f"{', '.join(tasks_of(architecture))}; choose one of these, or train the other class first"
            )
        _check_labels(source.settings.get("id2label"), path)
        encoder = open_encoder(source, path)
        model = _load(source, mesh=mesh, device=device or torch.device("cpu"), dtype=dtype)
        setup = Setup(
            options or Options(), encoder, labels=_labels(model.config), problem_type=model.config.problem_type
        )
        return cls(model, TASKS[task], setup, batch_size)

    def question(self, line: bytes) -> Question:
        """What one line asks; DataError when it cannot be read or encoded."""
        sample = read_line(line, self.task.form)
        return Question(sample, tuple(self.task.encode(sample, self.setup.encoder, self.setup.options)))

    def answers(self, questions: Sequence[Question]) -> Iterator[Record | DataError]:
        """The records of questions, in order; rows of like length go through the model together.

        An error stands where the model computed no numbers.
        """
        outputs = iter(self.outputs([row for question in questions for row in question.rows]))
        for question in questions:
            yield self._record(question, list(islice(outputs, len(question.rows))))

    def outputs(self, rows: Sequence[Row]) -> list[Output]:
        """What the model gives for each row."""
        found: dict[int, Output] = {}
        for numbers in by_length(rows, self.batch_size):
            batch = Batch.of([rows[number] for number in numbers], pad_id=self.model.config.pad_token_id)
            found.update(zip(numbers, self._compute(batch), strict=True))
        return [found[number] for number in range(len(rows))]

    def follow(self) -> None:
        """Compute what the first rank asks for, until it is finished."""
        axis, device = self.model.mesh.tensor, self.model.device
        while (batch := shared(None, axis, device)) is not None:
            compute(self.task.head, self.model, batch, self.setup)

    def finish(self) -> None:
        """Let the other ranks go."""
        shared(None, self.model.mesh.tensor, self.model.device)

    def _compute(self, batch: Batch) -> list[Output]:
        given = shared(batch, self.model.mesh.tensor, self.model.device)
        assert given is not None
        return compute(self.task.head, self.model, given, self.setup)

    def _record(self, question: Question, outputs: Sequence[Output]) -> Record | DataError:
        """Answer with what goes along."""
        if not all(bool(tensor.isfinite().all()) for output in outputs for tensor in output):
            return DataError("the model gives nan or infinite numbers; try --dtype float32, or train it anew")
        sample, rows = question.sample, question.rows
        record = self.task.answer(sample, rows, outputs, self.setup)
        cut = max(rows, key=lambda row: row.cut or 0)
        if cut.cut is not None:
            record |= {"truncated": {"tokens": cut.cut, "read": len(cut)}}
        return record if sample.id is None else {"id": sample.id, **record}


def _load(
    source: ModelSource, *, mesh: ParallelMesh | None, device: torch.device, dtype: torch.dtype | None
) -> PretrainedModel:
    """The class that the files hold, with every weight from them."""
    shape = tensor_shapes(source.shape, source.head)[WORDS]
    chosen = dtype or dtype_of(source.read, WORDS, shape)
    bare = {} if source.head.has_pooler else {"add_pooling_layer": False}
    options = bare if source.head.architecture == models.MegatronBertModel.__name__ else {}
    made: PretrainedModel = getattr(models, source.head.architecture)(
        MegatronBertConfig.from_shape(source.shape, source.settings),
        mesh=mesh,
        dtype=chosen,
        weights=converting(source.read, dtype),
        **options,
    )
    made.to(device).tie_weights()
    return made.eval()


def _check_labels(labels: JSON, path: Path) -> None:
    """FormatError for an ``id2label`` whose names cannot be told, or whose keys are no numbers."""
    if not labels:
        return
    if not isinstance(labels, Mapping) or not all(map(_is_label, labels.keys(), labels.values())):
        raise FormatError(
            f'{path}: id2label of config.json must name every label by its number, such as {{"0": "O"}}; mend it, '
            "or remove it to have LABEL_0, LABEL_1, ..."
        )


def _is_label(number: str, name: JSON) -> bool:
    is_text = isinstance(name, str) and name == name.encode("utf-8", "ignore").decode("utf-8")
    return is_text and number.isascii() and number.isdecimal()


def _labels(config: MegatronBertConfig) -> tuple[str, ...]:
    """Names of the labels by number, as `transformers` makes them where there are none."""
    names = config.id2label or {}
    return tuple(names.get(number, f"LABEL_{number}") for number in range(config.num_labels))
