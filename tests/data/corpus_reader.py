"""An independent reader of the corpus format, from the description of its bytes; and files in all packings."""

import gzip
import io
import lzma
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import zstandard

PACKERS = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def read_corpus(prefix: Path) -> list[list[list[int]]]:
    """Documents of sentences of ids."""
    index = io.BytesIO(Path(f"{prefix}.idx").read_bytes())
    assert index.read(9) == b"MMIDIDX\0\0"
    version, kind, num_sentences, num_boundaries = struct.unpack("<QBQQ", index.read(25))
    assert version == 1
    token_type = {4: "<i4", 8: "<u2"}[kind]
    lengths = np.frombuffer(index.read(4 * num_sentences), "<i4")
    pointers = np.frombuffer(index.read(8 * num_sentences), "<i8")
    boundaries = np.frombuffer(index.read(8 * num_boundaries), "<i8")
    assert not index.read()
    content = Path(f"{prefix}.bin").read_bytes()
    sentences = [
        np.frombuffer(content, token_type, count=length, offset=place).tolist()
        for length, place in zip(lengths, pointers, strict=True)
    ]
    return [sentences[first:last] for first, last in pairwise(boundaries)]
