"""safetensors files, written tensor by tensor: the library's own writer wants all of them in memory at once.

    8 bytes      length of the header, little-endian
    header       JSON: number format, shape and place of every tensor; padded with spaces to a multiple of 8
    numbers      of every tensor in turn: the widest number format first, then by name

The bytes are those that the library writes for the same tensors.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

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


def write_tensor_file(
    path: Path,
    contents: Sequence[Content],
    *,
    metadata: Mapping[str, str] | None = None,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Write and sync a file with ``contents``, of which one block is in memory at a time.

    ``metadata`` are notes in the header; ``advance`` hears the bytes of each block after it is written.
    OSError when the disk refuses.
    """
    ordered = sorted(contents, key=lambda content: (-list(KINDS).index(content.dtype), content.name))
    with path.open("wb") as file:
        file.write(_header(ordered, metadata))
        for content in ordered:
            written = 0
            for block in content.blocks():
                assert block.dtype == content.dtype, f"{content.name}: {block.dtype}, not {content.dtype}"
                written += file.write(_bytes_of(block))
                if advance is not None:
                    advance(block.nbytes)
                del block  # or two would be in memory while the next one is read
            assert written == content.size, f"{content.name}: {written} bytes, not {content.size}"
        file.flush()
        os.fsync(file.fileno())


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
