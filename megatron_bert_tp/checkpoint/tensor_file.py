"""safetensors files, written tensor by tensor: the library's own writer wants all of them in memory at once.

A second thread takes the SHA-256 of what is written, so that no file is read again for it.

    8 bytes      length of the header, little-endian
    header       JSON: number format, shape and place of every tensor; padded with spaces to a multiple of 8
    numbers      of every tensor in turn: the widest number format first, then by name

The bytes are those that the library writes for the same tensors.
"""

import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_bert_tp.checkpoint.manifest import FileRecord
from megatron_bert_tp.checkpoint.read import Reader

KINDS = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Number formats that are written, in the library's ascending order, and their names in the header."""
_BLOCK = 64 * 2**20  # bytes of a large tensor that are in memory at once
_AHEAD = 32 * 2**20  # bytes after which the disk is told to begin


@dataclass(frozen=True)
class Content:
    """A tensor to be written; ``blocks`` gives its rows from first to last, in any number of pieces."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterable[Tensor]]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


def read_in_blocks(read: Reader, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The tensor ``name`` of a source, in blocks of rows of some 64 MiB at most."""
    if not shape:
        yield read(name, (), ())
        return
    rows, *rest = shape
    at_once = max(1, _BLOCK // max(1, 8 * prod(rest)))
    for first in range(0, rows, at_once):
        yield read(name, (first, *(0 for _ in rest)), (min(at_once, rows - first), *rest))


class _HashingThread:
    """Context manager: a thread that takes the SHA-256 of one piece after another.

    An executor would take no work any more once the main thread has ended, while a save in the background goes on.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pieces: SimpleQueue[bytes | memoryview | None] = SimpleQueue()
        self._hashed: SimpleQueue[None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="sha256", daemon=True)

    def __enter__(self) -> "_HashingThread":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pieces.put(None)
        self._thread.join()

    def begin(self, piece: bytes | memoryview) -> None:
        """Add a piece, which must not change until `wait` returns."""
        self._pieces.put(piece)

    def wait(self) -> None:
        """Wait for the piece that was added."""
        self._hashed.get()

    def hexdigest(self) -> str:
        """Of all pieces that were waited for."""
        return self._digest.hexdigest()

    def _work(self) -> None:
        while (piece := self._pieces.get()) is not None:
            self._digest.update(piece)
            del piece  # or its memory would be held until the next one comes
            self._hashed.put(None)


class _HashedFile:
    """A file on its way to the disk, and the SHA-256 of all that was written to it."""

    def __init__(self, file: BinaryIO, hashing: _HashingThread) -> None:
        self._file, self._hashing = file, hashing
        self._size = self._begun = 0

    def write(self, content: bytes | memoryview) -> int:
        """Write and hash; gives the number of bytes."""
        pieces = range(0, len(content), _AHEAD)
        return sum(self._write_piece(content[first : first + _AHEAD]) for first in pieces)

    def _write_piece(self, content: bytes | memoryview) -> int:
        """Write, and hash meanwhile; neither looks at ``content`` afterwards."""
        self._hashing.begin(content)
        try:
            written = self._file.write(content)
        finally:
            self._hashing.wait()
        self._size += written
        if self._size - self._begun >= _AHEAD:
            self._begin()
        return written

    def finish(self) -> FileRecord:
        """Wait until all is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileRecord(self._size, self._hashing.hexdigest())

    def _begin(self) -> None:
        """Have the system begin to write now, without waiting; or the disk idles until the last sync.

        On Linux this is what the advice does to pages that are not on the disk yet.
        """
        if hasattr(os, "posix_fadvise"):
            self._file.flush()
            length = self._size - self._begun
            os.posix_fadvise(self._file.fileno(), self._begun, length, os.POSIX_FADV_DONTNEED)
        self._begun = self._size


def write_tensor_file(
    path: Path,
    contents: Sequence[Content],
    *,
    metadata: Mapping[str, str] | None = None,
    advance: Callable[[int], None] | None = None,
) -> FileRecord:
    """Write and sync a file with ``contents``, of which one block is in memory at a time; gives size and SHA-256.

    ``metadata`` are notes in the header; ``advance`` hears the bytes of each block after it is written.
    OSError when the disk refuses.
    """
    ordered = sorted(contents, key=lambda content: (-list(KINDS).index(content.dtype), content.name))
    with path.open("wb") as file, _HashingThread() as hashing:
        hashed = _HashedFile(file, hashing)
        hashed.write(_header(ordered, metadata))
        for content in ordered:
            written = 0
            for block in content.blocks():
                assert block.dtype == content.dtype, f"{content.name}: {block.dtype}, not {content.dtype}"
                written += hashed.write(_bytes_of(block))
                if advance is not None:
                    advance(block.nbytes)
                del block  # or two would be in memory while the next one is read
            assert written == content.size, f"{content.name}: {written} bytes, not {content.size}"
        return hashed.finish()


def _header(ordered: Sequence[Content], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for content in ordered:
        begin, end = end, end + content.size
        place = {"dtype": KINDS[content.dtype], "shape": list(content.shape), "data_offsets": [begin, end]}
        assert content.name not in entries, f"{content.name}: given twice"
        entries[content.name] = place
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes_of(block: Tensor) -> memoryview:
    flat = block.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
