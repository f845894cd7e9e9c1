"""Tokenised corpora in Megatron-LM's format, one sequence a sentence: PREFIX.bin and PREFIX.idx, mapped."""

import bisect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.data.corpus.check import OpenIndex, check_index
from megatron_bert_tp.data.corpus.facts import CorpusFacts, corpus_paths
from megatron_bert_tp.data.corpus.index import (
    LENGTH_TYPE,
    PLACE_TYPE,
    Layout,
    index_digest,
    map_array,
    open_plain,
    read_layout,
    release,
    size_of,
)
from megatron_bert_tp.data.draws import Ints
from megatron_bert_tp.errors import DataError

_SCANNED_ALWAYS = 100_000_000  # tokens; their scan takes under 0.1 s
_BLOCK = 1 << 22  # numbers that are looked at together
_LARGEST_FACTS = 1 << 20  # bytes


@dataclass(frozen=True)
class Corpus:
    """A memory-mapped corpus; nothing that grows with its size is copied into memory.

    Pickled, as for a worker process, it is its prefix: the other process maps the same files.
    """

    prefix: Path
    tokens: npt.NDArray[Any]
    """``[tokens]`` ids of all sentences, back to back."""
    lengths: npt.NDArray[np.int32]
    """``[sentences]`` tokens of each sentence, at least 1; not aligned, see `data.corpus.index`."""
    pointers: npt.NDArray[np.int64]
    """``[sentences]`` byte of the .bin at which each sentence begins; not aligned."""
    documents: npt.NDArray[np.int64]
    """``[documents + 1]`` first sentence of each document, then the number of sentences; not aligned."""
    facts: CorpusFacts | None = None
    """None for a corpus that was not made by this package."""

    @classmethod
    def open(cls, prefix: Path) -> "Corpus":
        """Map the files; DataError when one is missing or damaged or they do not belong together.

        Every number of the index is looked at, but no token: see `check_token_ids`.
        """
        bin_path, idx_path, _ = corpus_paths(prefix)
        with _opened(prefix) as (bin_file, idx_file):
            layout = read_layout(idx_file, idx_path)
            check_index(OpenIndex(idx_file, layout, idx_path, bin_path, size_of(bin_file)))
            corpus = cls._of_files(prefix, bin_file, idx_file, layout=layout)
        corpus._check_facts()
        return corpus

    @classmethod
    def open_again(cls, prefix: Path, num_sentences: int, num_tokens: int) -> "Corpus":
        """A corpus that `open` has checked before, perhaps in another process, and that has these numbers."""
        with _opened(prefix) as (bin_file, idx_file):
            layout = read_layout(idx_file, corpus_paths(prefix)[1])
            found = (layout.num_sentences, size_of(bin_file) // layout.token_type.itemsize)
            if found != (num_sentences, num_tokens):
                raise DataError(
                    f"{prefix}: had {num_sentences} sentences and {num_tokens} tokens when it was opened, now "
                    f"it has {found[0]} and {found[1]}: do not write a corpus that is in use"
                )
            return cls._of_files(prefix, bin_file, idx_file, layout=layout)

    @classmethod
    def _of_files(cls, prefix: Path, bin_file: BinaryIO, idx_file: BinaryIO, *, layout: Layout) -> "Corpus":
        num_tokens = size_of(bin_file) // layout.token_type.itemsize
        return cls(
            prefix,
            map_array(bin_file, layout.token_type, count=num_tokens),
            map_array(idx_file, LENGTH_TYPE, count=layout.num_sentences, offset=layout.lengths_at),
            map_array(idx_file, PLACE_TYPE, count=layout.num_sentences, offset=layout.pointers_at),
            map_array(idx_file, PLACE_TYPE, count=layout.num_boundaries, offset=layout.documents_at),
            _read_facts(corpus_paths(prefix)[2]),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Corpus.open_again, (self.prefix, self.num_sentences, self.num_tokens)

    @property
    def num_documents(self) -> int:
        """Documents, those without sentences included."""
        return len(self.documents) - 1

    @property
    def num_sentences(self) -> int:
        """Sentences of all documents."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sentences."""
        return len(self.tokens)

    def starts_of(self, boundaries: Ints) -> Ints:
        """First token of each of these sentences, any shape; for ``num_sentences`` it is the number of tokens."""
        is_end = boundaries == self.num_sentences
        starts: Ints = self.pointers[np.where(is_end, 0, boundaries)] // self.tokens.itemsize
        return np.where(is_end, self.num_tokens, starts)

    def sentence(self, number: int) -> npt.NDArray[Any]:
        """Token ids of one sentence, a view into the file."""
        start = int(self.pointers[number]) // self.tokens.itemsize
        return self.tokens[start : start + int(self.lengths[number])]

    def sentence_at(self, token: int) -> int:
        """Number of the sentence that holds a token, in a binary search that reads a few pages."""
        return bisect.bisect_right(self.pointers, token * self.tokens.itemsize) - 1

    def document_of(self, sentence: int) -> int:
        """Number of the document that holds a sentence."""
        return bisect.bisect_right(self.documents, sentence) - 1

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of where sentences and documents begin: see `index_digest`."""
        sha256 = index_digest(self.tokens.itemsize, self.num_sentences, len(self.documents))
        for array, dtype in ((self.lengths, LENGTH_TYPE), (self.documents, PLACE_TYPE)):
            for block in _blocks(array):
                sha256.update(block.astype(dtype, copy=False).data)
        return sha256.hexdigest()

    def _check_facts(self) -> None:
        if self.facts is None:
            return
        said = (self.facts.documents, self.facts.sentences, self.facts.tokens)
        found = (self.num_documents, self.num_sentences, self.num_tokens)
        if said != found:
            raise DataError(
                f"{self.prefix}: the .json speaks of {said} documents, sentences and tokens, the .idx of {found}; "
                "they belong to different corpora: run `preprocess` again"
            )


def check_tokenizer(corpus: Corpus, *, sha256: str, lowercase: bool) -> None:
    """DataError when PREFIX.json says that the corpus was made with another tokenizer."""
    facts = corpus.facts
    if facts is None or (facts.tokenizer_sha256, facts.lowercase) == (sha256, lowercase):
        return
    raise DataError(
        f"{corpus.prefix}: made with the tokenizer {facts.tokenizer_sha256[:12]} (lowercase {facts.lowercase}), "
        f"but the tokenizer given is {sha256[:12]} (lowercase {lowercase}): "
        "set data.tokenizer and data.lowercase to those of the corpus, or run `preprocess` again"
    )


def check_digest(corpus: Corpus) -> None:
    """DataError when PREFIX.json was made with another .idx; looks at the whole index, once for a `Corpus`."""
    said = corpus.facts.index_sha256 if corpus.facts else None
    if said is not None and said != corpus.digest:
        raise DataError(
            f"{corpus.prefix}.idx: belongs to another corpus, or was altered: the .json says that its lengths and "
            f"boundaries have the SHA-256 {said}, but it is {corpus.digest}; copy all three files again, or run "
            "`preprocess` again"
        )


def check_token_ids(corpus: Corpus, vocab_size: int) -> None:
    """DataError naming the first sentence with an id outside 0..vocab_size-1.

    Scans all tokens; from 100 million tokens on, PREFIX.json's largest id is believed where there is one.
    """
    facts = corpus.facts
    if facts is not None and corpus.num_tokens > _SCANNED_ALWAYS and facts.largest_id < vocab_size:
        return
    for number, block in enumerate(_blocks(corpus.tokens)):
        if block.min() >= 0 and block.max() < vocab_size:
            continue
        position = number * _BLOCK + int(np.flatnonzero((block < 0) | (block >= vocab_size))[0])
        raise DataError(
            f"{corpus.prefix}.bin: token ids must lie in 0..{vocab_size - 1}, but sentence "
            f"{corpus.sentence_at(position)} holds {int(corpus.tokens[position])}; use the tokenizer that made "
            "the corpus, and a vocab_size of at least its size"
        )


@contextmanager
def _opened(prefix: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    bin_path, idx_path, _ = corpus_paths(prefix)
    with open_plain(bin_path) as bin_file, open_plain(idx_path) as idx_file:
        yield bin_file, idx_file


def _read_facts(path: Path) -> CorpusFacts | None:
    """Facts of PREFIX.json, None where there is no such file."""
    if not os.path.lexists(path):
        return None
    with open_plain(path) as file:
        size = size_of(file)
    if size > _LARGEST_FACTS:
        raise DataError(
            f"{path}: the facts of a corpus have at most {_LARGEST_FACTS} bytes, this file has {size}; "
            "move it away or run `preprocess` again"
        )
    return CorpusFacts.read(path)


def _blocks(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    for first in range(0, len(array), _BLOCK):
        yield array[first : first + _BLOCK]
        release(array)
