"""Where weights may come from: a Hugging Face directory, a checkpoint or a run, and sizes without weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from megatron_bert_tp.checkpoint.durable import JSON
from megatron_bert_tp.checkpoint.model import (
    check_model,
    check_tensors,
    differences,
    head_of,
    missing_heads,
    shape_of,
)
from megatron_bert_tp.checkpoint.read import Checkpoint, Reader
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.huggingface import HuggingFaceDirectory
from megatron_bert_tp.formats.huggingface_config import CONFIG, read_config
from megatron_bert_tp.formats.recognition import check_model as check_model_path
from megatron_bert_tp.formats.task_folder import model_folder
from megatron_bert_tp.formats.tokenizer_files import TOKENIZER_FILES, said_lowercase
from megatron_bert_tp.model.shape import PRETRAINING, Head, ModelShape

LOWERCASE = "lowercase"
"""Fact of a checkpoint: whether its ``vocab.txt`` is uncased."""
HUGGINGFACE = "huggingface"
"""Fact of a checkpoint: the keys of an imported config.json that its shape and class do not hold."""


@dataclass(frozen=True)
class ModelSource:
    """A model that is read from somewhere, slice by slice, and what goes along with it."""

    shape: ModelShape
    head: Head
    read: Reader
    tokenizer_files: Mapping[str, Path]
    lowercase: bool | None = None
    settings: Mapping[str, JSON] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> "ModelSource":
        """Model in a Hugging Face directory, or in a checkpoint whose every SHA-256 is compared.

        Of a finished run on a task it is the best one.  FormatError or CheckpointError when the path holds none.
        """
        check_model_path(path)
        path = model_folder(path)
        if (path / CONFIG).is_file():
            found = HuggingFaceDirectory.open(path)
            files = found.tokenizer_files
            lowercase = said_lowercase(files)
            return cls(found.shape, found.head, found.read, files, lowercase=lowercase, settings=found.settings)
        checkpoint = Checkpoint.open(path)
        source = cls.of_checkpoint(checkpoint)
        checkpoint.verify()
        return source

    @classmethod
    def without_weights(cls, path: Path) -> "ModelSource":
        """Sizes and tokenizer of a Hugging Face directory, in which there need be no weights."""
        found = read_config(path / CONFIG)
        files = {name: path / name for name in TOKENIZER_FILES if (path / name).is_file()}
        head = found.head or PRETRAINING
        return cls(found.shape, head, _no_weights, files, lowercase=said_lowercase(files), settings=found.settings)

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> "ModelSource":
        """Model in a checkpoint; CheckpointError when its tensors are not those that its facts say."""
        shape, head = shape_of(checkpoint), head_of(checkpoint)
        check_tensors(checkpoint, shape, head)
        files = {name: path for name, path in checkpoint.attachments.items() if name in TOKENIZER_FILES}
        lowercase, settings = checkpoint.facts.get(LOWERCASE), checkpoint.facts.get(HUGGINGFACE)
        return cls(
            shape,
            head,
            checkpoint.weight,
            files,
            lowercase=lowercase if isinstance(lowercase, bool) else None,
            settings=settings if isinstance(settings, Mapping) else {},
        )


def _no_weights(name: str, offsets: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
    raise AssertionError(f"{name}, {extent} from {offsets}, is read, but only sizes were asked for")


def open_sizes(path: Path, *, verify: bool) -> ModelSource:
    """Sizes and tokenizer of what `open_encoder_weights` takes; a Hugging Face directory needs no weights."""
    check_model_path(path)
    path = model_folder(path)
    if (path / CONFIG).is_file():
        return ModelSource.without_weights(path)
    return open_encoder_weights(path, verify=verify)


def open_encoder_weights(path: Path, *, verify: bool) -> ModelSource:
    """Model whose encoder a task begins with; only with ``verify`` is a checkpoint compared with its SHA-256.

    FormatError or CheckpointError when the path holds none.
    """
    check_model_path(path)
    path = model_folder(path)
    if verify or (path / CONFIG).is_file():
        return ModelSource.open(path)
    return ModelSource.of_checkpoint(Checkpoint.open(path))


def open_weights(path: Path, shape: ModelShape, *, verify: bool) -> Reader:
    """Reader of the weights for a pretraining run in a Hugging Face directory, or in one of our checkpoints.

    FormatError or CheckpointError when the path holds neither, or the weights of another model than ``shape``,
    or of another class than `MegatronBertForPreTraining`.
    With ``verify`` every file of a checkpoint is compared with its SHA-256, for which one rank is enough.
    """
    check_model_path(path)
    if not (path / CONFIG).is_file():
        checkpoint = Checkpoint.open(path)
        check_model(checkpoint, shape)
        if verify:
            checkpoint.verify()
        return checkpoint.weight
    directory = HuggingFaceDirectory.open(path)
    if directory.head != PRETRAINING:
        raise FormatError(f"{path}: {missing_heads(shape, directory.head)}")
    differing = differences(directory.shape, shape)
    if differing:
        raise FormatError(
            f"{path}: the weights are of another model than the settings:\n{differing}\n"
            "set these to the values there, or give other weights"
        )
    return directory.read
