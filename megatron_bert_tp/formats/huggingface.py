"""Reading a Hugging Face directory of any of the nine classes, slice by slice."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_bert_tp.checkpoint.durable import JSON, printable
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.classes import head_in, internal_name, is_ignored, is_of_a_head
from megatron_bert_tp.formats.huggingface_config import CONFIG, LABELS, HuggingFaceConfig, read_config
from megatron_bert_tp.formats.stored_tensors import DTYPES, WEIGHTS, StoredTensor, open_directory
from megatron_bert_tp.formats.tokenizer_files import TOKENIZER_FILES
from megatron_bert_tp.model.shape import Head, ModelShape, tensor_shapes

DECODER_WEIGHT = "cls.predictions.decoder.weight"
DECODER_BIAS = "cls.predictions.decoder.bias"
BIAS = "cls.predictions.bias"
_WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class HuggingFaceDirectory:
    """A checked directory, of which nothing but the headers is in memory; names carry the prefix ``bert.``.

    Where the embeddings are not tied, transformers computes with ``decoder.bias`` and leaves
    ``cls.predictions.bias`` idle: `read` gives the former for the name of the latter.
    """

    path: Path
    shape: ModelShape
    head: Head
    """The class that was asked for, or that of the files."""
    settings: Mapping[str, JSON] = field(default_factory=dict)
    """The keys of config.json that the shape and the class do not hold, to be written again on export."""
    new: tuple[str, ...] = ()
    """Tensors that the head needs and the files lack: whoever loads makes them up."""
    unused: tuple[str, ...] = ()
    """Tensors of the files that the head has no place for."""
    _tensors: Mapping[str, StoredTensor] = field(default_factory=dict, repr=False)

    @classmethod
    def open(
        cls, path: Path, head: Head | None = None, *, num_labels: int | None = None
    ) -> "HuggingFaceDirectory":
        """Directory at ``path``; FormatError when a file, a tensor or a setting is missing or does not fit.

        With a ``head`` of another class than that of the files, tensors of heads may be new or unused; without
        one, the tensors must be exactly those of the class.  ``num_labels`` overrides that of the files.
        """
        if not path.is_dir():
            raise FormatError(f"{path}: no such directory; give one with {CONFIG} and {WEIGHTS}")
        config = _with_labels(read_config(path / CONFIG), num_labels)
        stored = open_directory(path)
        tensors = _renamed(path, stored)
        found = head_in(tensors, config.shape, config.head)
        wanted = found if head is None else head
        new, unused = _fit(path, tensors, config.shape, wanted=wanted, may_differ=wanted != found)
        directory = cls(path, config.shape, wanted, config.settings, new, unused, tensors)
        if wanted.has_predictions and config.shape.tie_word_embeddings:
            directory._check_tied(DECODER_WEIGHT, _WORD_EMBEDDINGS)
            directory._check_tied(DECODER_BIAS, BIAS)
        return directory

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        """Path of every tokenizer file that there is, by its name."""
        return {name: self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file()}

    def dtype(self, name: str = _WORD_EMBEDDINGS) -> torch.dtype:
        """Number format of a tensor in the files; of the word embeddings, where none is named."""
        return self._find(name).dtype

    def read(self, name: str, offsets: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        """Rectangle of a tensor, in the number format of the file (a `Reader`); no more is read.

        FormatError for a name in `new`.
        """
        return self._find(name).read(offsets, extent)

    def _find(self, name: str) -> StoredTensor:
        if name == BIAS and not self.shape.tie_word_embeddings and DECODER_BIAS in self._tensors:
            name = DECODER_BIAS
        if name not in self._tensors:
            raise FormatError(
                f"{self.path}: has no {name}; it is new in a {self.head.architecture} and must be initialised"
            )
        return self._tensors[name]

    def _check_tied(self, copy: str, original: str) -> None:
        """A copy that the file carries although the settings tie it must be equal."""
        if copy not in self._tensors or original not in self._tensors:
            return
        one, other = self._tensors[copy], self._tensors[original]
        rows, *rest = one.shape
        for first in range(0, rows, _ROWS_AT_ONCE):
            offsets = (first, *(0 for _ in rest))
            extent = (min(_ROWS_AT_ONCE, rows - first), *rest)
            if not torch.equal(one.read(offsets, extent), other.read(offsets, extent)):
                raise FormatError(
                    f"{self.path}: {copy} differs from {original}, although {CONFIG} ties them; "
                    "set tie_word_embeddings to false there if the model was trained untied"
                )


def _with_labels(config: HuggingFaceConfig, num_labels: int | None) -> HuggingFaceConfig:
    """The settings with another number of labels, whose names are then unknown."""
    if num_labels is None or num_labels == config.shape.num_labels:
        return config
    settings = {name: value for name, value in config.settings.items() if name not in LABELS}
    return replace(config, shape=replace(config.shape, num_labels=num_labels), settings=settings)


def _renamed(path: Path, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors under their names with the prefix, buffers of old files left out."""
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        full = internal_name(name)
        if full in renamed:
            raise FormatError(f"{path}: holds {name} with and without the prefix 'bert.'; remove one of them")
        if not is_ignored(full):
            renamed[full] = tensor
    return renamed


def _fit(
    path: Path, tensors: Mapping[str, StoredTensor], shape: ModelShape, *, wanted: Head, may_differ: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the new and of the unused tensors; FormatError with all that does not fit."""
    expected = tensor_shapes(shape, wanted)
    copies = {DECODER_WEIGHT: (shape.vocab_size, shape.hidden_size), DECODER_BIAS: (shape.vocab_size,)}
    allowed = {**expected, **(copies if wanted.has_predictions else {})}
    has_live_bias = not shape.tie_word_embeddings and DECODER_BIAS in tensors
    lacking = [name for name in expected if name not in tensors and not (name == BIAS and has_live_bias)]
    surplus = [name for name in tensors if name not in allowed]
    new = tuple(name for name in lacking if may_differ and is_of_a_head(name))
    unused = tuple(name for name in surplus if may_differ and is_of_a_head(name))
    lines = [f"  missing: {name}" for name in sorted({*lacking} - {*new})]
    lines += [f"  unexpected: {printable(name)}" for name in sorted({*surplus} - {*unused})]
    lines += [
        line
        for name in sorted(tensors.keys() & allowed.keys())
        for line in _misfits(name, tensors[name], allowed[name])
    ]
    if lines:
        more = [f"  and {len(lines) - 20} more"] if len(lines) > 20 else []
        title = f"{path}: its tensors are not those of a {wanted.architecture}:"
        raise FormatError("\n".join([title, *lines[:20], *more]))
    return new, unused


def _misfits(name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> list[str]:
    lines = []
    if tensor.shape != shape and name.startswith(("classifier.", "qa_outputs.")):
        lines.append(
            f"  {name} has the shape {tensor.shape}, but {shape[0]} outputs are asked for, which is {shape}; "
            f"ask for {tensor.shape[0] if tensor.shape else 1}, or start from a directory without this layer"
        )
    elif tensor.shape != shape:
        lines.append(f"  {name} has the shape {tensor.shape}, but {CONFIG} says {shape}")
    if tensor.kind not in DTYPES:
        lines.append(f"  {name} has the number format {tensor.kind}; only {', '.join(DTYPES)} can be read")
    return lines
