"""Files as streams of bytes, unpacked on the way where their name ends in .gz, .xz or .zst."""

import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import zstandard

from megatron_bert_tp.data.refusals import reading
from megatron_bert_tp.errors import DataError

_BLOCK = 1 << 18
_PACKED_BLOCK = 1 << 12  # bytes that are unpacked at once: they may become 130 MB, where a text repeats itself
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile)
_SIGNATURES = {
    b"\x1f\x8b": "gzip data: rename it to end in .gz",
    b"\xfd7zXZ": "xz data: rename it to end in .xz",
    b"(\xb5/\xfd": "Zstandard data: rename it to end in .zst",
    b"PAR1": "Parquet: rename it to end in .parquet",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\xff\xfe": "UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
}


@dataclass(frozen=True)
class Stream:
    """The unpacked bytes of a file, and the file itself."""

    unpacked: BinaryIO
    packed: BinaryIO

    @property
    def num_packed(self) -> int:
        """Bytes of the file that have been read."""
        return self.packed.tell()


class _Frame(Protocol):
    """A decompressor of one frame, as `zstandard` and `lzma` have it."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


class _Frames(io.RawIOBase):
    """Frames back to back; EOFError when the last one is cut short.

    The libraries' own files keep silent there: that of `zstandard` when a frame is cut short, that of `lzma` when
    a frame after the first is damaged or stands behind padding.
    """

    def __init__(self, packed: BinaryIO, new_frame: Callable[[], _Frame], padding: bytes):
        self._packed, self._new_frame, self._padding = packed, new_frame, padding
        self._frame = new_frame()
        self._is_begun = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        while not self._ready:
            block = self._next_block()
            if not block and self._is_begun:
                raise EOFError("it ends in the middle of a frame")
            if not block:
                return 0
            self._is_begun = True
            self._ready = memoryview(self._frame.decompress(block))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _next_block(self) -> bytes:
        """Packed bytes for the frame in work, or after its end for a new one; empty at the end of the file."""
        if self._is_begun and not self._frame.eof:
            return self._packed.read(_PACKED_BLOCK)
        padding = self._padding if self._frame.eof else b""
        block = (self._frame.unused_data if self._frame.eof else b"") or self._packed.read(_PACKED_BLOCK)
        while block and not (block := block.lstrip(padding)):
            block = self._packed.read(_PACKED_BLOCK)
        self._frame, self._is_begun = self._new_frame(), False
        return block


def _zstd_frame() -> _Frame:
    return zstandard.ZstdDecompressor().decompressobj()


_UNPACKERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": lambda file: cast(BinaryIO, gzip.GzipFile(fileobj=file)),
    ".xz": lambda file: io.BufferedReader(_Frames(file, lzma.LZMADecompressor, b"\0"), _BLOCK),
    ".zst": lambda file: io.BufferedReader(_Frames(file, _zstd_frame, b""), _BLOCK),
}


def inner_suffix(path: Path) -> str:
    """Lower-case ending of a file's name without that of its compression: ``.jsonl`` of ``a.JSONL.gz``."""
    name = path.with_suffix("") if path.suffix.lower() in _UNPACKERS else path
    return name.suffix.lower()


@contextmanager
def open_stream(path: Path) -> Iterator[Stream]:
    """Context manager over the unpacked bytes; inside it, damage and refusals become a DataError."""
    with reading(path), path.open("rb") as packed:
        unpack = _UNPACKERS.get(path.suffix.lower())
        try:
            if unpack is None:
                yield Stream(packed, packed)
                return
            with unpack(packed) as unpacked:
                yield Stream(unpacked, packed)
        except _DAMAGE as error:
            raise DataError(
                f"{path}: the compressed data is damaged or cut short ({error}) near byte {packed.tell():,} of "
                f"{path.stat().st_size:,}; fetch the file again, then run the same command again"
            ) from error


def recognised(path: Path) -> str | None:
    """What a file is by its first bytes, and the way out, where that is not text."""
    with reading(path), path.open("rb") as file:
        head = file.read(8)
    return next((told for signature, told in _SIGNATURES.items() if head.startswith(signature)), None)
