"""Reading a Hugging Face directory of a `MegatronBertForPreTraining`, slice by slice."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_bert_tp.checkpoint.durable import is_basename, read_object
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.huggingface_config import CONFIG, read_config
from megatron_bert_tp.formats.tokenizer_files import TOKENIZER_FILES
from megatron_bert_tp.model.shape import ModelShape, tensor_shapes

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DECODER_WEIGHT = "cls.predictions.decoder.weight"
DECODER_BIAS = "cls.predictions.decoder.bias"
BIAS = "cls.predictions.bias"
_WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
_IGNORED = {"bert.embeddings.position_ids"}
_LARGEST_INDEX = 16 * 2**20  # bytes
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class HuggingFaceDirectory:
    """A checked directory, of which nothing but the headers is in memory.

    Where the embeddings are not tied, transformers computes with ``decoder.bias`` and leaves
    ``cls.predictions.bias`` idle: `read` gives the former for the name of the latter.
    """

    path: Path
    shape: ModelShape
    _handles: Mapping[str, safe_open] = field(repr=False)
    """Open file of every tensor in it."""

    @classmethod
    def open(cls, path: Path) -> "HuggingFaceDirectory":
        """Directory at ``path``; FormatError when a file, a tensor or a setting is missing or does not fit."""
        if not path.is_dir():
            raise FormatError(f"{path}: no such directory; give one with {CONFIG} and {WEIGHTS}")
        shape = read_config(path / CONFIG)
        handles = {name: handle for handle in _open_files(path) for name in handle.keys()}  # noqa: SIM118
        _check_tensors(path, handles, shape)
        directory = cls(path, shape, handles)
        if shape.tie_word_embeddings:
            directory._check_tied(DECODER_WEIGHT, _WORD_EMBEDDINGS)
            directory._check_tied(DECODER_BIAS, BIAS)
        return directory

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        """Path of every tokenizer file that there is, by its name."""
        return {name: self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file()}

    def read(self, name: str, offsets: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        """Rectangle of a tensor, in the number format of the file (a `Reader`); no more is read."""
        if name == BIAS and not self.shape.tie_word_embeddings and DECODER_BIAS in self._handles:
            name = DECODER_BIAS
        return self._stored(name, offsets, extent)

    def _stored(self, name: str, offsets: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        window = tuple(slice(first, first + size) for first, size in zip(offsets, extent, strict=True))
        try:
            piece: Tensor = self._handles[name].get_slice(name)[window]
        except (OSError, SafetensorError) as error:
            raise FormatError(f"{self.path}: {name} cannot be read: {error}") from error
        assert tuple(piece.shape) == extent, f"{name}: {offsets} + {extent} lies outside the tensor"
        return piece

    def _check_tied(self, copy: str, original: str) -> None:
        """A copy that the file carries although the settings tie it must be equal."""
        if copy not in self._handles:
            return
        rows, *rest = _shape_of(self._handles[copy], copy)
        for first in range(0, rows, _ROWS_AT_ONCE):
            offsets = (first, *(0 for _ in rest))
            extent = (min(_ROWS_AT_ONCE, rows - first), *rest)
            if not torch.equal(self._stored(copy, offsets, extent), self._stored(original, offsets, extent)):
                raise FormatError(
                    f"{self.path}: {copy} differs from {original}, although {CONFIG} ties them; "
                    "set tie_word_embeddings to false there if the model was trained untied"
                )


def _open_files(path: Path) -> list[safe_open]:
    """Handles of the one file, or of those that the index names."""
    if (path / WEIGHTS).is_file():
        return [_open(path / WEIGHTS)]
    if (path / INDEX).is_file():
        return [_open(path / name) for name in _indexed_files(path / INDEX)]
    pickled = sorted(file.name for file in path.glob("*.bin"))
    hint = f"; {pickled[0]} is a pickle, which is never read: save it again as safetensors" if pickled else ""
    raise FormatError(f"{path}: has neither {WEIGHTS} nor {INDEX}{hint}")


def _indexed_files(index: Path) -> list[str]:
    weight_map = read_object(index, largest=_LARGEST_INDEX, error=FormatError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: weight_map must say for every tensor in which file it is")
    wrong = [name for name in weight_map.values() if not is_basename(name)]
    if wrong:
        raise FormatError(f"{index}: {wrong[0]!r} is not the plain name of a file in that directory")
    return sorted({str(name) for name in weight_map.values()})


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise FormatError(
            f"{path}: cannot be read ({error}); the file is missing or damaged, fetch it again"
        ) from error


def _check_tensors(path: Path, handles: Mapping[str, safe_open], shape: ModelShape) -> None:
    """Every tensor of the model is there, in a shape and format that fit, and no other."""
    expected = tensor_shapes(shape)
    allowed = {**expected, DECODER_WEIGHT: expected[_WORD_EMBEDDINGS], DECODER_BIAS: (shape.vocab_size,)}
    required = expected.keys() - ({BIAS} if not shape.tie_word_embeddings and DECODER_BIAS in handles else set())
    present = handles.keys() - _IGNORED
    lines = [f"  missing: {name}" for name in sorted(required - present)]
    lines += [f"  unexpected: {name}" for name in sorted(present - allowed.keys())]
    for name in sorted(present & allowed.keys()):
        found, kind = _shape_of(handles[name], name), handles[name].get_slice(name).get_dtype()
        if found != allowed[name]:
            lines.append(f"  {name} has the shape {found}, but {CONFIG} says {allowed[name]}")
        if kind not in _DTYPES:
            lines.append(f"  {name} has the number format {kind}; only {', '.join(_DTYPES)} can be read")
    if lines:
        more = [f"  and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise FormatError(
            "\n".join([f"{path}: its tensors are not those of a MegatronBertForPreTraining:", *lines[:20], *more])
        )


def _shape_of(handle: safe_open, name: str) -> tuple[int, ...]:
    return tuple(handle.get_slice(name).get_shape())
