"""`manifest.json`: which rectangle of which tensor is in which file, and what every file must look like.

The manifest carries a SHA-256 of itself, so that a flipped bit in a step number or an offset is seen too, and it
has one form, so that one in a space is.  All numbers are bounded before anything is allocated by them.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from megatron_bert_tp.checkpoint.durable import JSON, is_basename, read_object, sha256_of
from megatron_bert_tp.checkpoint.slices import DTYPES, Slice, check_coverage
from megatron_bert_tp.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = "megatron_bert_tp checkpoint"
VERSION = 1
_LARGEST = 256 * 2**20  # bytes; the manifest of a 24-layer model has a few MB on 64 ranks, and 50 MB on 1024
_MOST_FILES = 100_000
_LARGEST_NUMBER = 2**53  # what every program that reads JSON keeps exactly
_MOST_DIMS, _LONGEST_NAME = 4, 1000
_SHA256 = re.compile("[0-9a-f]{64}")
_DIGEST = "sha256"


@dataclass(frozen=True)
class FileRecord:
    """What a file must look like: ``size`` in bytes, SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All that is known of a checkpoint without opening a tensor file."""

    step: int
    facts: Mapping[str, JSON]
    files: Mapping[str, FileRecord]
    attachments: tuple[str, ...]
    slices: tuple[Slice, ...]

    def dump(self) -> str:
        """The text of `manifest.json`."""
        body: dict[str, JSON] = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return _text({**body, _DIGEST: _digest(body)})

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Manifest at ``path``; CheckpointError when it is missing, damaged or contradicts itself."""
        if path.is_symlink():
            raise CheckpointError(f"{path}: is a symbolic link; a checkpoint holds its files itself")
        body = read_object(path, largest=_LARGEST, error=CheckpointError)
        _check_origin(path, body)
        try:
            manifest = cls._from(body)
            check_coverage(manifest.slices)
            _check_room(manifest)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        return manifest

    @classmethod
    def _from(cls, body: Mapping[str, JSON]) -> "Manifest":
        files, slices = _contents(body)
        attachments = tuple(_basename(name) for name in _list(body, "attachments"))
        named = {*attachments, *(row.file for row in slices)}
        if named - files.keys():
            raise CheckpointError(f"files without size and SHA-256: {', '.join(sorted(named - files.keys()))}")
        return cls(_natural(body.get("step"), "step"), _object(body, "facts"), files, attachments, slices)


@dataclass(frozen=True)
class Note:
    """What one rank has written: the contribution that rank 0 merges to the manifest."""

    files: Mapping[str, FileRecord]
    slices: tuple[Slice, ...]

    def dump(self) -> str:
        """JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, path: Path) -> "Note":
        """Note at ``path``; CheckpointError when it is damaged."""
        return cls(*_contents(read_object(path, largest=_LARGEST, error=CheckpointError)))


def record_of(path: Path) -> FileRecord:
    """What the file at ``path`` looks like now."""
    return FileRecord(path.stat().st_size, sha256_of(path))


def _contents(body: Mapping[str, JSON]) -> tuple[dict[str, FileRecord], tuple[Slice, ...]]:
    listed = _object(body, "files")
    if len(listed) > _MOST_FILES:
        raise CheckpointError(f"{len(listed)} files are more than the {_MOST_FILES} that are credible")
    files = {_basename(name): _record(value) for name, value in listed.items()}
    return files, tuple(_slice(row) for row in _list(body, "slices"))


def _slice(value: JSON) -> Slice:
    row = _as_object(value, "slice")
    name, dtype = row.get("name"), row.get("dtype")
    if not isinstance(name, str) or len(name) > _LONGEST_NAME or not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"slice {name!r:.80}: dtype {dtype!r} is none of {', '.join(DTYPES)}")
    shape, offsets, extent = (_numbers(row, key) for key in ("shape", "offsets", "extent"))
    return Slice(name, shape, offsets, extent, dtype, _basename(row.get("file")))


def _record(value: JSON) -> FileRecord:
    record = _as_object(value, "file")
    sha256 = record.get("sha256")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise CheckpointError(f"the SHA-256 of a file must be text of 64 hexadecimal digits, not {sha256!r:.80}")
    return FileRecord(_natural(record.get("size"), "size of a file"), sha256)


def _check_origin(path: Path, body: dict[str, JSON]) -> None:
    """The file is a manifest of a version that is read here, and as it was written."""
    if body.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not the manifest of a checkpoint (format {body.get('format')!r})")
    if body.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: has format version {body.get('version')!r}, this program reads {VERSION}; "
            "use the program that wrote it"
        )
    if body.get(_DIGEST) != _digest({key: value for key, value in body.items() if key != _DIGEST}):
        raise CheckpointError(f"{path}: its content does not fit its SHA-256; it is damaged or was edited")
    if path.read_bytes() != _text(body).encode():
        raise CheckpointError(f"{path}: is not in the form in which it was written; it is damaged or was edited")


def _check_room(manifest: Manifest) -> None:
    """Every file has room for its rectangles; so no shape is larger than what lies on the disk."""
    need = dict.fromkeys(manifest.files, 0)
    for row in manifest.slices:
        need[row.file] += prod(row.extent) * DTYPES[row.dtype].itemsize
    for name, size in need.items():
        if size > manifest.files[name].size:
            raise CheckpointError(
                f"the rectangles in {name} have {size} bytes, the file only {manifest.files[name].size}"
            )


def _text(body: Mapping[str, JSON]) -> str:
    return json.dumps(body, indent=1, allow_nan=False) + "\n"


def _digest(body: Mapping[str, JSON]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _basename(name: object) -> str:
    if not is_basename(name):
        raise CheckpointError(f"{name!r} is not the plain name of a file in the checkpoint's directory")
    return str(name)


def _natural(value: JSON, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST_NUMBER:
        raise CheckpointError(f"{what} must be a number from 0 on, not {value!r:.50}")
    return value


def _numbers(row: Mapping[str, JSON], key: str) -> tuple[int, ...]:
    values = _list(row, key)
    if len(values) > _MOST_DIMS:
        raise CheckpointError(f"{key} of a slice has {len(values)} numbers, more than {_MOST_DIMS}")
    return tuple(_natural(value, key) for value in values)


def _object(body: Mapping[str, JSON], key: str) -> Mapping[str, JSON]:
    return _as_object(body.get(key), key)


def _as_object(value: JSON, what: str) -> Mapping[str, JSON]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{what} must be an object, not {value!r}")
    return value


def _list(body: Mapping[str, JSON], key: str) -> list[JSON]:
    value = body.get(key)
    if not isinstance(value, list):
        raise CheckpointError(f"{key} must be a list, not {value!r}")
    return value
