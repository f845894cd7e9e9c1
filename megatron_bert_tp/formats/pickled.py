"""`pytorch_model.bin`: tensors in a pickle, of which nothing but tensors is ever unpickled."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.megatron.pickle_globals import check_directory, is_zip, scan

# What torch.save asks for to write plain tensors, parameters among them, and their storages.
_OF_TENSORS = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_(?:tensor|tensor_v2|parameter)|torch\.\w+Storage|"
    r"torch\.storage\.(?:Untyped|Typed)Storage|torch\.Size|torch\.device|torch\.b?float\d*|torch\.double|"
    r"torch\.half|torch\.u?int\d+|torch\.bool"
)
_HARMLESS = 4096  # bytes; files speak of the number of torch's old protocol, 1001


def load_pickled(path: Path) -> dict[str, Tensor]:
    """Tensors of a `torch.save`d state dict; those of today's zip form stay on the disk until they are used.

    FormatError when the file is damaged, or holds anything but tensors under names: no other object is made
    and no code of the file is run.
    """
    if not path.is_file():
        raise FormatError(f"{path}: cannot be read (no such file); the file is missing, fetch it again")
    try:
        _check(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
    except Exception as error:  # a damaged or hostile pickle fails in any way
        raise FormatError(
            f"{path}: cannot be read: {_reason(error)}; fetch it again, or have it saved as safetensors"
        ) from error
    return _tensors(path, loaded)


def _check(path: Path) -> None:
    """FormatError unless the pickle can make nothing but tensors that lie in the file."""
    if is_zip(path):
        check_directory(path)
        _check_stored(path)
    found = scan(path)
    refused = sorted(name for name in found.names if not _OF_TENSORS.fullmatch(name))
    if refused:
        raise FormatError(
            f"its pickle holds more than tensors, which is never unpickled: it asks for {', '.join(refused[:10])}"
        )
    size = path.stat().st_size
    if found.largest_number > max(size, _HARMLESS):
        raise FormatError(f"its pickle speaks of {found.largest_number} numbers, but the file has {size} bytes")


def _check_stored(path: Path) -> None:
    """Torch stores the members of its zip files as they are: what unpacks to more than the file is a bomb."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise FormatError("it has compressed members, which torch.save does not write")
    unpacked, size = sum(member.file_size for member in members), path.stat().st_size
    if unpacked > size:
        raise FormatError(f"its members claim {unpacked} bytes, but it has {size}")


def _tensors(path: Path, loaded: object) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        raise FormatError(f"{path}: must hold tensors under their names, not a {type(loaded).__name__}")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise FormatError(
                f"{path}: holds a {type(value).__name__} under {name!r}; only a state dict can be read: plain "
                "tensors under their names"
            )
    _check_sizes(path, loaded)
    return {name: Tensor.detach(value) for name, value in loaded.items()}


def _check_sizes(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """FormatError when tensors have more bytes than the file, by repeating some; a tied one counts once."""
    for name, value in tensors.items():
        if any(size > 1 and not stride for size, stride in zip(value.shape, value.stride(), strict=True)):
            raise FormatError(
                f"{path}: {name!r} repeats one number {value.numel()} times; save it as contiguous()"
            )
    views = {(each.data_ptr(), each.shape, each.stride(), each.dtype): each for each in tensors.values()}
    total, size = sum(each.numel() * each.itemsize for each in views.values()), path.stat().st_size
    if total > size:
        raise FormatError(
            f"{path}: its tensors have {total} bytes, but the file {size}: they overlap; save them as contiguous()"
        )


def _reason(error: Exception) -> str:
    """What is wrong, or what torch says was not allowed, out of its page of advice on how to allow it."""
    if isinstance(error, FormatError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    told = (telling or lines or [type(error).__name__])[0][:300]
    return f"it is damaged, or its pickle holds more than tensors, which is never unpickled ({told})"
