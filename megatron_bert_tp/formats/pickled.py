"""`pytorch_model.bin`: tensors in a pickle, of which nothing but tensors is ever unpickled."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_bert_tp.errors import FormatError


def load_pickled(path: Path) -> dict[str, Tensor]:
    """Tensors of a `torch.save`d state dict; those of today's zip form stay on the disk until they are used.

    FormatError when the file is damaged, or holds anything but tensors under names: no other object is made
    and no code of the file is run.
    """
    if not path.is_file():
        raise FormatError(f"{path}: cannot be read (no such file); the file is missing, fetch it again")
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip:
            _check_stored(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except FormatError:
        raise
    except Exception as error:  # a damaged or hostile pickle fails in any way
        raise FormatError(
            f"{path}: cannot be read: it is damaged, or its pickle holds more than tensors, which is never "
            f"unpickled ({_reason(error)}); fetch it again, or save it as safetensors where it was made"
        ) from error
    return _tensors(path, loaded)


def _check_stored(path: Path) -> None:
    """Torch stores the members of its zip files as they are: what unpacks to more than the file is a bomb."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise FormatError(f"{path}: has compressed members, which torch.save does not write; fetch it again")
    unpacked = sum(member.file_size for member in members)
    if unpacked > path.stat().st_size:
        raise FormatError(
            f"{path}: its members claim {unpacked} bytes, but it has {path.stat().st_size}; fetch it again"
        )


def _tensors(path: Path, loaded: object) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        raise FormatError(f"{path}: must hold tensors under their names, not a {type(loaded).__name__}")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise FormatError(
                f"{path}: holds a {type(value).__name__} under {name!r}; only a state dict can be read: plain "
                "tensors under their names"
            )
    return {name: value.detach() for name, value in loaded.items()}


def _reason(error: Exception) -> str:
    """What torch says was not allowed, out of its page of advice on how to allow it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return " ".join((telling or lines or [type(error).__name__])[:1])[:300]
