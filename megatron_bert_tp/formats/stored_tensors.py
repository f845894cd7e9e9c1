"""The tensors in the weight files of a Hugging Face directory: headers at once, numbers when asked for."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_bert_tp.checkpoint.durable import check_regular, is_basename, read_object
from megatron_bert_tp.checkpoint.open_files import OpenFiles
from megatron_bert_tp.checkpoint.tensor_file import KINDS
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.pickled import load_pickled

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
_LARGEST_INDEX = 16 * 2**20  # bytes
DTYPES = {kind: dtype for dtype, kind in KINDS.items() if dtype.is_floating_point}
"""Number formats of weights by their name in a safetensors file."""

Window = tuple[slice, ...]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file; ``kind`` is its number format under the name that safetensors gives it."""

    name: str
    path: Path
    shape: tuple[int, ...]
    kind: str
    _cut: Callable[[Window], Tensor] = field(repr=False, compare=False)

    @property
    def dtype(self) -> torch.dtype:
        """Number format."""
        return DTYPES[self.kind]

    def read(self, offsets: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        """Rectangle of it; FormatError when the file cannot be read."""
        window = tuple(slice(first, first + size) for first, size in zip(offsets, extent, strict=True))
        try:
            piece = self._cut(window)
        except (OSError, SafetensorError) as error:
            raise FormatError(f"{self.path}: {self.name} cannot be read: {error}") from error
        assert tuple(piece.shape) == extent, f"{self.name}: {offsets} + {extent} lies outside the tensor"
        return piece


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights of a Hugging Face directory; FormatError when there are none."""
    for single, index in ((WEIGHTS, INDEX), (PICKLED, PICKLED_INDEX)):
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            return [directory / name for name in _indexed_files(directory / index)]
    raise FormatError(
        f"{directory}: has neither {WEIGHTS} nor {INDEX}, nor {PICKLED} nor {PICKLED_INDEX}; "
        "the weights must lie there under one of these names"
    )


def open_tensors(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor in some files by its name there; FormatError when a file is damaged, or two hold the same."""
    found: dict[str, StoredTensor] = {}
    handles, pickles = OpenFiles(_open_safetensors), OpenFiles(load_pickled)
    for path in paths:
        opened = _safetensors(path, handles) if path.suffix == ".safetensors" else _pickled(path, pickles)
        for tensor in opened:
            if tensor.name in found:
                raise FormatError(
                    f"{path}: holds {tensor.name}, as {found[tensor.name].path} does; remove one of them"
                )
            found[tensor.name] = tensor
    return found


def open_directory(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a Hugging Face directory; FormatError when its index says another file for one, or none."""
    files = weight_files(directory)
    stored = open_tensors(files)
    index = directory / (INDEX if files[0].suffix == Path(WEIGHTS).suffix else PICKLED_INDEX)
    if directory / WEIGHTS in files or directory / PICKLED in files:
        return stored
    listed = _weight_map(index)
    for name in sorted({*stored, *listed}):
        found = stored[name].path.name if name in stored else None
        if found != listed.get(name):
            raise FormatError(
                f"{index}: says that {name!r} is in {listed.get(name, 'no file')}, but it is in "
                f"{found or 'none of the files'}; index and files are not of one model, fetch all again"
            )
    return stored


def _open_safetensors(path: Path) -> safe_open:
    if path.exists():
        check_regular(path, FormatError)
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise FormatError(
            f"{path}: cannot be read ({error}); the file is missing or damaged, fetch it again"
        ) from error


def _safetensors(path: Path, files: OpenFiles[safe_open]) -> Iterator[StoredTensor]:
    handle = files.get(path)
    for name in handle.keys():  # noqa: SIM118
        header = handle.get_slice(name)
        cut = partial(_cut_safetensor, files, path, name)
        yield StoredTensor(name, path, tuple(header.get_shape()), str(header.get_dtype()), cut)


def _cut_safetensor(files: OpenFiles[safe_open], path: Path, name: str, window: Window) -> Tensor:
    piece: Tensor = files.get(path).get_slice(name)[window or ...]
    files.count(piece.nbytes)
    return piece


def _pickled(path: Path, files: OpenFiles[dict[str, Tensor]]) -> Iterator[StoredTensor]:
    for name, tensor in files.get(path).items():
        cut = partial(_cut_pickled, files, path, name)
        yield StoredTensor(name, path, tuple(tensor.shape), _kind(tensor), cut)


def _cut_pickled(files: OpenFiles[dict[str, Tensor]], path: Path, name: str, window: Window) -> Tensor:
    piece = files.get(path)[name][window]
    files.count(piece.nbytes)
    return piece


def _kind(tensor: Tensor) -> str:
    return KINDS.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def _indexed_files(index: Path) -> list[str]:
    return sorted(set(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    """File of every tensor, as an index says it."""
    weight_map = read_object(index, largest=_LARGEST_INDEX, error=FormatError).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise FormatError(f"{index}: weight_map must say for every tensor in which file it is")
    wrong = [name for name in weight_map.values() if not is_basename(name)]
    if wrong:
        raise FormatError(f"{index}: {wrong[0]!r} is not the plain name of a file in that directory")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    strange = [name for name in weight_map.values() if not str(name).endswith(suffix)]
    if strange:
        raise FormatError(f"{index}: names {strange[0]!r}, but may only name files that end in {suffix}")
    return {name: str(file) for name, file in weight_map.items()}
