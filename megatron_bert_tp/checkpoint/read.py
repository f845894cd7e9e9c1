"""Reading a checkpoint: any rectangle of any tensor, from whichever files hold it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_bert_tp.checkpoint.directories import find_checkpoint
from megatron_bert_tp.checkpoint.durable import JSON, readable, sha256_of
from megatron_bert_tp.checkpoint.manifest import MANIFEST, Manifest
from megatron_bert_tp.checkpoint.open_files import OpenFiles
from megatron_bert_tp.checkpoint.slices import DTYPES, Slice, by_name, end_of, intersection
from megatron_bert_tp.errors import CheckpointError


class Reader(Protocol):
    """Source of weights: the rectangle of size ``extent`` at ``offsets`` of the tensor ``name``."""

    def __call__(self, name: str, offsets: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        """Tensor of shape ``extent`` on the CPU."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on the disk, of which nothing but the manifest is in memory."""

    directory: Path
    manifest: Manifest
    _files: OpenFiles[safe_open] = field(default_factory=lambda: OpenFiles(_open), repr=False, compare=False)

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Checkpoint at ``path``, or the newest in a folder of checkpoints or of a run.

        Checks the manifest and the size of every file; CheckpointError names what is wrong.
        """
        return cls.at(find_checkpoint(path))

    @classmethod
    def at(cls, directory: Path) -> "Checkpoint":
        """Checkpoint in this very directory; checks as `open` does."""
        checkpoint = cls(directory, Manifest.read(directory / MANIFEST))
        checkpoint._check_sizes()
        checkpoint._check_strangers()
        return checkpoint

    @property
    def step(self) -> int:
        """Optimizer steps that were done."""
        return self.manifest.step

    @property
    def facts(self) -> Mapping[str, JSON]:
        """What the run wrote down beside the tensors."""
        return self.manifest.facts

    @property
    def attachments(self) -> dict[str, Path]:
        """Path of every file that went along, by its name."""
        return {name: self.directory / name for name in self.manifest.attachments}

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(record.size for record in self.manifest.files.values())

    @cached_property
    def _rows(self) -> dict[str, list[Slice]]:
        return by_name(self.manifest.slices)

    def verify(self, *, rank: int = 0, size: int = 1) -> None:
        """Read every file and compare its SHA-256; CheckpointError names the first damaged one.

        Where ``size`` ranks share the work, ``rank`` reads every ``size``-th file only.
        """
        for name, record in islice(self.manifest.files.items(), rank, None, size):
            if _sha256_of(self.directory / name) != record.sha256:
                raise CheckpointError(
                    f"{self.directory / name}: its content does not fit the SHA-256 in {MANIFEST}; the file is "
                    "damaged, use another checkpoint"
                )

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Whole shape of every tensor of a kind (``weight``, ``exp_avg``, ...), by name without the kind."""
        prefix = f"{kind}/"
        return {
            name.removeprefix(prefix): rows[0].shape
            for name, rows in self._rows.items()
            if name.startswith(prefix)
        }

    def read(self, name: str, offsets: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        """Rectangle of the tensor ``kind/name``, put together from the files, of which no more is read."""
        rows = self._rows.get(name)
        if rows is None:
            raise CheckpointError(f"{self.directory}: has no tensor {name}")
        _check_inside(name, rows[0].shape, offsets, extent)
        end = end_of(offsets, extent)
        pieces = [
            (overlap, self._piece(row, *overlap)) for row in rows if (overlap := intersection(offsets, end, row))
        ]
        whole = torch.empty(extent, dtype=DTYPES[rows[0].dtype])
        for (begin, stop), piece in pieces:
            whole[_window(begin, stop, offsets)] = piece
        return whole

    def weight(self, name: str, offsets: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        """Rectangle of a weight by its Hugging Face name (a `Reader`)."""
        return self.read(f"weight/{name}", offsets, extent)

    def _piece(self, row: Slice, begin: tuple[int, ...], end: tuple[int, ...]) -> Tensor:
        """What lies from ``begin`` to ``end`` of the whole tensor, all of it in ``row``."""
        path = self.directory / row.file
        try:
            stored = self._files.get(path).get_slice(row.name)
            shape = tuple(stored.get_shape())
            piece: Tensor = stored[_window(begin, end, row.offsets)] if shape else stored[...]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {row.name} cannot be read: {error}; the file is damaged") from error
        if shape != row.extent or piece.dtype != DTYPES[row.dtype]:
            raise CheckpointError(
                f"{path}: {row.name} is {shape} {piece.dtype}, but {MANIFEST} says {row.extent} {row.dtype}; "
                "the file belongs to another checkpoint"
            )
        self._files.count(piece.nbytes)
        return piece

    def _check_sizes(self) -> None:
        for name, record in self.manifest.files.items():
            path = self.directory / name
            if path.is_symlink():
                raise CheckpointError(f"{path}: is a symbolic link; a checkpoint holds its files itself")
            if not path.is_file():
                raise CheckpointError(f"{path}: is missing; {MANIFEST} lists it, use another checkpoint")
            size = path.stat().st_size
            if size != record.size:
                raise CheckpointError(
                    f"{path}: has {size} bytes, but {MANIFEST} says {record.size} ({readable(record.size)}); the "
                    "file is damaged or cut off, use another checkpoint"
                )

    def _check_strangers(self) -> None:
        """Files that the manifest does not know tell of a mix of two checkpoints; hidden ones are the system's."""
        known = {MANIFEST, *self.manifest.files}
        for path in sorted(self.directory.iterdir()):
            if path.name not in known and not path.name.startswith("."):
                raise CheckpointError(
                    f"{path}: is not of this checkpoint: {MANIFEST} does not list it; move it elsewhere"
                )


def _sha256_of(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; use another checkpoint") from error


def _open(path: Path) -> safe_open:
    return safe_open(path, framework="pt")


def _window(begin: tuple[int, ...], end: tuple[int, ...], origin: tuple[int, ...]) -> tuple[slice, ...]:
    """Index of a rectangle of the whole tensor inside a part of it that begins at ``origin``."""
    return tuple(slice(first - zero, last - zero) for first, last, zero in zip(begin, end, origin, strict=True))


def _check_inside(name: str, shape: tuple[int, ...], offsets: tuple[int, ...], extent: tuple[int, ...]) -> None:
    fits = len(offsets) == len(extent) == len(shape) and all(
        first >= 0 and size >= 0 and first + size <= whole
        for first, size, whole in zip(offsets, extent, shape, strict=True)
    )
    if not fits:
        raise CheckpointError(
            f"{name}: the rectangle at {offsets} of size {extent} does not lie inside its shape {shape}; the "
            "checkpoint is of another model"
        )
