r"""Megatron-LM's index of a corpus (MMIDIDX version 1): its header, and its arrays without a copy.

The .idx, little endian::

    "MMIDIDX\0\0"  u64 version = 1   u8 type   u64 sentences   u64 boundaries      34 bytes
    i32[sentences]   tokens of each sentence
    i64[sentences]   byte of the .bin at which each sentence begins
    i64[boundaries]  first sentence of each document, then the number of sentences

The header has 34 bytes, so no array of a mapped index stands at a multiple of its item size: numpy copies such
an array as a whole for `searchsorted`, `diff`, `take` and the like, but neither for indexing nor for a slice.
"""

import hashlib
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.data.refusals import reading
from megatron_bert_tp.errors import DataError

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
_TYPE_NAMES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
TOKEN_TYPES = {code: np.dtype(name) for code, name in _TYPE_NAMES.items()}
_FLOAT_CODES = {6: "float64", 7: "float32"}
LENGTH_TYPE, PLACE_TYPE = np.dtype("<i4"), np.dtype("<i8")

MAKE_IT = "`python -m megatron_bert_tp.preprocess INPUT... --tokenizer FILE --output PREFIX`"
DAMAGED = "the corpus is damaged: copy it again or run `preprocess` again"


@dataclass(frozen=True)
class Layout:
    """What the header of an .idx says, and where the arrays stand because of it."""

    token_type: np.dtype[Any]
    num_sentences: int
    num_boundaries: int

    @property
    def lengths_at(self) -> int:
        """Byte at which the lengths begin."""
        return HEADER.size

    @property
    def pointers_at(self) -> int:
        """Byte at which the places in the .bin begin."""
        return self.lengths_at + LENGTH_TYPE.itemsize * self.num_sentences

    @property
    def documents_at(self) -> int:
        """Byte at which the document boundaries begin."""
        return self.pointers_at + PLACE_TYPE.itemsize * self.num_sentences

    @property
    def size(self) -> int:
        """Bytes of the whole .idx."""
        return self.documents_at + PLACE_TYPE.itemsize * self.num_boundaries


@contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
    """Context manager that opens a file of a corpus; DataError for a missing one, a directory, a pipe."""
    with reading(path):
        if not os.path.lexists(path):
            prefix = path.with_suffix("")
            if prefix.suffix in (".bin", ".idx", ".json") and prefix.exists():
                raise DataError(
                    f"{path}: no such file; a corpus is named by its PREFIX, without an ending: "
                    f"give {prefix.with_suffix('')}"
                )
            raise DataError(
                f"{path}: no such file; make it with {MAKE_IT}; data.corpus is its PREFIX, without an ending"
            )
        if not path.is_file():  # asked first: opening a pipe would wait for somebody to write into it
            raise DataError(
                f"{path}: must be a plain file, not a directory, a pipe or a link to nothing; "
                f"give another PREFIX, or make a corpus with {MAKE_IT}"
            )
        with path.open("rb", buffering=0) as file:
            yield file


def size_of(file: BinaryIO) -> int:
    """Bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def read_layout(file: BinaryIO, path: Path) -> Layout:
    """Layout of an open .idx; DataError unless magic, version, type code and the file's size agree with it."""
    size = size_of(file)
    if size < HEADER.size:
        raise DataError(f"{path}: an index has at least {HEADER.size} bytes, this file has {size}; {DAMAGED}")
    magic, version, code, sentences, boundaries = HEADER.unpack(os.pread(file.fileno(), HEADER.size, 0))
    if magic != MAGIC:
        raise DataError(f"{path}: begins with {magic!r}, not {MAGIC!r}: not an index of Megatron-LM's format")
    if version != VERSION:
        raise DataError(f"{path}: version {version} cannot be read, only version {VERSION}; {DAMAGED}")
    layout = Layout(_token_type(code, path), sentences, boundaries)
    if size != layout.size:
        raise DataError(_wrong_size(layout, size, path))
    return layout


def map_array(file: BinaryIO, dtype: np.dtype[Any], *, count: int, offset: int = 0) -> npt.NDArray[Any]:
    """``count`` numbers of an open file from the byte ``offset`` on: read-only, not in memory until looked at."""
    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(content, dtype=dtype, count=count, offset=offset)


def release(array: npt.NDArray[Any]) -> None:
    """Let go of the pages of a mapped array that were read; they come back from the file when they are used."""
    content = getattr(array.base, "obj", None)  # the base is a memoryview of the map
    if isinstance(content, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        content.madvise(mmap.MADV_DONTNEED)


def read_array(file: BinaryIO, into: npt.NDArray[Any], *, offset: int) -> None:
    """Fill ``into`` with the bytes of an open file from ``offset`` on; DataError when the file ends before.

    Unlike a mapped array it is aligned, and pages of the file do not count as memory of this process.
    """
    left = into.view(np.uint8).data
    while left:
        done = os.preadv(file.fileno(), [left], offset)
        if not done:
            raise DataError(f"{file.name}: ends at byte {offset} while it is read; does another program write it?")
        left, offset = left[done:], offset + done


def index_digest(token_size: int, num_sentences: int, num_boundaries: int) -> "hashlib._Hash":
    """SHA-256 of an index, to be fed with its lengths (i32) and then its boundaries (i64), little endian.

    It begins with the bytes of a token and the two counts (u64): all that samples are cut by, but no token.
    """
    return hashlib.sha256(struct.pack("<3Q", token_size, num_sentences, num_boundaries))


def _token_type(code: int, path: Path) -> np.dtype[Any]:
    if code in TOKEN_TYPES:
        return TOKEN_TYPES[code]
    names = ", ".join(f"{number} {dtype}" for number, dtype in TOKEN_TYPES.items())
    reason = f"{_FLOAT_CODES[code]}, which are no token ids" if code in _FLOAT_CODES else DAMAGED
    raise DataError(f"{path}: the type code must be one of {names}, this index has {code}: {reason}")


def _wrong_size(layout: Layout, size: int, path: Path) -> str:
    told = (
        f"{path}: {layout.num_sentences} sentences and {layout.num_boundaries} document boundaries take "
        f"{layout.size} bytes, the file has {size}"
    )
    if size == layout.size + layout.num_sentences > layout.size:
        return (
            f"{told}: one byte more for each sentence, as a multimodal index has it; only text can be read: "
            f"make the corpus with {MAKE_IT}"
        )
    return f"{told}; {DAMAGED}"
