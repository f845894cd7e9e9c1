"""Files that survive a crash: synced, hashed, replaced in one step; and JSON that is read with suspicion."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import TypeAlias

from megatron_bert_tp.errors import MegatronBertError

JSON: TypeAlias = Mapping[str, "JSON"] | Sequence["JSON"] | str | int | float | bool | None


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file and wait until it is on the disk."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def replace_text(path: Path, text: str) -> None:
    """Give a file new content so that every reader, also after a crash, sees the old or the new one."""
    fresh = fresh_name(path)
    fresh.unlink(missing_ok=True)  # a link that somebody put there would be written through
    try:
        write_text(fresh, text)
        os.replace(fresh, path)
    except OSError:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise
    sync(path.parent)


def fresh_name(path: Path) -> Path:
    """Where the new content of a file stands until it takes the place of the old one."""
    return path.with_name(f"{path.name}.new")


def make_folder(path: Path) -> None:
    """Make a folder and those above it, so that they are there after a crash too."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read as a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def readable(num_bytes: int) -> str:
    """Size for people, in decimal units: ``12.3 MB``."""
    for exponent, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if num_bytes >= 10**exponent:
            return f"{num_bytes / 10**exponent:.1f} {unit}"
    return f"{num_bytes} bytes"


def no_room(path: Path, need: int, error: Exception) -> str:
    """Message for a file or directory of ``need`` bytes that could not be written."""
    free = readable(free_bytes(path))
    return (
        f"{path}: cannot be written: {error}; it needs {readable(need)}, and {free} are free. "
        "Free some space, or choose another folder; what stood there before is untouched"
    )


def free_bytes(path: Path) -> int:
    """Bytes that may still be written at ``path``, or in the next folder above it that exists."""
    place = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(place).free


def printable(name: str) -> str:
    """A name from a file for people: characters that steer a terminal are written as in ``repr``."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in name)


def is_basename(name: object) -> bool:
    """Whether ``name`` is the name of a file inside a directory, and no way out of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def check_regular(path: Path, error: type[MegatronBertError]) -> None:
    """Raises ``error`` when ``path`` is something that would keep a reader waiting, or no file at all."""
    if not path.exists() or path.is_dir():
        raise error(f"{path}: no such file; fetch it again")
    if not path.is_file():
        raise error(f"{path}: is a pipe or a device, not a file; give the file itself")


def read_object(path: Path, *, largest: int, error: type[MegatronBertError]) -> dict[str, JSON]:
    """The JSON object in a file of at most ``largest`` bytes; raises ``error`` when there is none."""
    if not path.is_file():
        raise error(f"{path}: no such file")
    size = path.stat().st_size
    if size > largest:
        raise error(f"{path}: has {readable(size)}, more than the {readable(largest)} that are credible")
    try:
        value = json.loads(path.read_bytes(), parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as cause:
        raise error(f"{path}: not valid JSON ({cause}); the file is damaged") from cause
    if not isinstance(value, dict):
        raise error(f"{path}: must hold a JSON object, not a {type(value).__name__}")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text} is larger than any number can be")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")
