"""The numbers of an .idx, compared with each other and with the .bin: block by block, so in little memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.data.corpus.index import (
    DAMAGED,
    LENGTH_TYPE,
    MAKE_IT,
    PLACE_TYPE,
    Layout,
    read_array,
)
from megatron_bert_tp.errors import DataError

_BLOCK = 1 << 16  # sentences or documents: their numbers stay in the cache of a core


@dataclass(frozen=True)
class OpenIndex:
    """An .idx whose header has been read, and the .bin that it should belong to."""

    file: BinaryIO
    layout: Layout
    idx_path: Path
    bin_path: Path
    bin_size: int


def check_index(index: OpenIndex) -> None:
    """DataError unless sentences follow each other through the whole .bin and documents through all sentences.

    What is wrong with the sizes is told at once, without a look at the arrays.
    """
    _check_counts(index)
    _check_end(index)
    _check_sentences(index)
    _check_documents(index)


def _check_counts(index: OpenIndex) -> None:
    sentences, documents = index.layout.num_sentences, max(index.layout.num_boundaries - 1, 0)
    if not (sentences and documents and index.bin_size):
        raise DataError(
            f"{index.idx_path}: an empty corpus ({sentences} sentences, {documents} documents, "
            f"{index.bin_size} bytes of tokens); make it with {MAKE_IT}"
        )


def _check_end(index: OpenIndex) -> None:
    """The last sentence ends where the .bin ends: one look finds most corpora whose halves do not match."""
    layout = index.layout
    length, pointer = np.empty(1, LENGTH_TYPE), np.empty(1, PLACE_TYPE)
    read_array(index.file, length, offset=layout.pointers_at - LENGTH_TYPE.itemsize)
    read_array(index.file, pointer, offset=layout.documents_at - PLACE_TYPE.itemsize)
    expected = int(pointer[0]) + int(length[0]) * layout.token_type.itemsize
    if expected != index.bin_size:
        raise DataError(
            f"{index.bin_path}: the index {index.idx_path.name} expects {expected} bytes, the file has "
            f"{index.bin_size}: one of the two is cut short, altered or of another corpus; {DAMAGED}"
        )


def _check_sentences(index: OpenIndex) -> None:
    layout = index.layout
    lengths, pointers = np.empty(_BLOCK, LENGTH_TYPE), np.empty(_BLOCK, PLACE_TYPE)
    begin = 0
    for first in range(0, layout.num_sentences, _BLOCK):
        size = min(_BLOCK, layout.num_sentences - first)
        read_array(index.file, lengths[:size], offset=layout.lengths_at + LENGTH_TYPE.itemsize * first)
        read_array(index.file, pointers[:size], offset=layout.pointers_at + PLACE_TYPE.itemsize * first)
        begin = _check_block(index, first, begin, lengths=lengths[:size], pointers=pointers[:size])
        if begin > index.bin_size:
            last = first + size - 1
            raise DataError(
                f"{index.bin_path}: sentence {last} of {index.idx_path.name} ends at byte {begin}, the file has "
                f"{index.bin_size} bytes; {DAMAGED}"
            )


def _check_block(
    index: OpenIndex,
    first: int,
    begin: int,
    *,
    lengths: npt.NDArray[np.int32],
    pointers: npt.NDArray[np.int64],
) -> int:
    """Byte at which the sentences of a block end that begins with sentence ``first`` at byte ``begin``."""
    if lengths.min() < 1:
        shortest = int(np.flatnonzero(lengths < 1)[0])
        raise DataError(
            f"{index.idx_path}: sentence {first + shortest} has {lengths[shortest]} tokens, not 1 or more; "
            f"{DAMAGED}"
        )
    # Nothing wraps around: 2**16 lengths are below 2**31 each, and `begin` is at most the size of the .bin.
    # In place and of one type: this is most of the time that opening takes.
    ends = lengths.astype(np.int64)
    ends *= index.layout.token_type.itemsize
    np.cumsum(ends, out=ends)
    ends += begin
    if pointers[0] != begin or (pointers[1:] != ends[:-1]).any():
        expected = np.concatenate([[begin], ends[:-1]])
        place = int(np.flatnonzero(pointers != expected)[0])
        raise DataError(
            f"{index.idx_path}: sentence {first + place} must begin at byte {expected[place]}, where the one "
            f"before it ends, the index says {pointers[place]}; {DAMAGED}"
        )
    return int(ends[-1])


def _check_documents(index: OpenIndex) -> None:
    """Boundaries rise from 0 to the number of sentences; equal ones are documents without a sentence."""
    layout = index.layout
    boundaries = np.empty(_BLOCK, PLACE_TYPE)
    before = 0
    for first in range(0, layout.num_boundaries, _BLOCK):
        block = boundaries[: min(_BLOCK, layout.num_boundaries - first)]
        read_array(index.file, block, offset=layout.documents_at + PLACE_TYPE.itemsize * first)
        if first == 0 and block[0] != 0:
            raise DataError(_wrong_documents(index, f"the first is {block[0]}"))
        if block[0] < before or (block[1:] < block[:-1]).any():
            place = int(np.flatnonzero(block < np.concatenate([[before], block[:-1]]))[0])
            last = block[place - 1] if place else before
            raise DataError(_wrong_documents(index, f"boundary {first + place} is {block[place]} after {last}"))
        before = int(block[-1])
    if before != layout.num_sentences:
        raise DataError(_wrong_documents(index, f"the last is {before}"))


def _wrong_documents(index: OpenIndex, found: str) -> str:
    return (
        f"{index.idx_path}: document boundaries must rise from 0 to {index.layout.num_sentences} (the sentences), "
        f"but {found}; {DAMAGED}"
    )
