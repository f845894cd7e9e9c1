"""Corpora written and read from the description of the format alone, with struct and array, without the package.

9 bytes "MMIDIDX" and two zeros, u64 version 1, u8 type, u64 sentences, u64 boundaries, little endian;
i32 tokens of each sentence; i64 byte of the .bin at which it begins; i64 first sentence of each document,
then the number of sentences.  The .bin holds the ids back to back.
"""

import struct
import sys
from array import array
from itertools import accumulate, pairwise
from pathlib import Path

CODES = {"B": 1, "b": 2, "h": 3, "i": 4, "q": 5, "H": 8}
"""Letter of `array` for each type of a token."""


def number_bytes(letter: str, numbers) -> bytes:
    """The numbers, little endian on any machine."""
    numbers = array(letter, numbers)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def index_bytes(lengths, boundaries, *, letter="H", code=None, magic=b"MMIDIDX\0\0", version=1, pointers=None):
    """An .idx; ``code`` and ``pointers`` follow from the letter and the lengths unless they are given."""
    if pointers is None:
        pointers = [array(letter).itemsize * start for start in [0, *accumulate(lengths)][: len(lengths)]]
    code = CODES[letter] if code is None else code
    header = magic + struct.pack("<QBQQ", version, code, len(lengths), len(boundaries))
    return header + number_bytes("i", lengths) + number_bytes("q", pointers) + number_bytes("q", boundaries)


def write_files(prefix: Path, documents: list[list[list[int]]], *, letter: str = "H") -> Path:
    """PREFIX.bin and PREFIX.idx of documents, which are lists of sentences of ids."""
    sentences = [sentence for document in documents for sentence in document]
    boundaries = [0, *accumulate(len(document) for document in documents)]
    ids = [token for sentence in sentences for token in sentence]
    Path(f"{prefix}.bin").write_bytes(number_bytes(letter, ids))
    Path(f"{prefix}.idx").write_bytes(index_bytes([*map(len, sentences)], boundaries, letter=letter))
    return prefix


def read_files(prefix: Path) -> tuple[str, list[list[list[int]]]]:
    """Letter of the tokens and documents of a corpus, each number unpacked at the place where it must stand."""
    idx, tokens = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert idx[:9] == b"MMIDIDX\x00\x00"
    (version,) = struct.unpack("<Q", idx[9:17])
    assert version == 1
    letter = {code: letter for letter, code in CODES.items()}[idx[17]]
    size = struct.calcsize(f"<{letter}")
    num_sentences, num_boundaries = struct.unpack("<QQ", idx[18:34])
    assert len(idx) == 34 + 4 * num_sentences + 8 * num_sentences + 8 * num_boundaries
    sentences, end = [], 0
    for n in range(num_sentences):
        (length,) = struct.unpack_from("<i", idx, 34 + 4 * n)
        (pointer,) = struct.unpack_from("<q", idx, 34 + 4 * num_sentences + 8 * n)
        assert length > 0
        assert pointer == end
        end = pointer + length * size
        sentences.append([token for (token,) in struct.iter_unpack(f"<{letter}", tokens[pointer:end])])
    assert end == len(tokens)
    boundaries = [n for (n,) in struct.iter_unpack("<q", idx[34 + 12 * num_sentences :])]
    assert (boundaries[0], boundaries[-1]) == (0, num_sentences)
    return letter, [sentences[first:last] for first, last in pairwise(boundaries)]
