"""A look at every number of a corpus: what is in it, and what should not be."""

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.data.corpus.index import open_plain, read_array, release
from megatron_bert_tp.data.corpus.mapped import Corpus
from megatron_bert_tp.data.draws import Ints
from megatron_bert_tp.data.refusals import reading

LONG_SENTENCE = 512  # tokens; Megatron-LM leaves out a document with a longer sentence
_BLOCK = 1 << 21  # tokens: large enough for one thread to hash while the other counts
_INDEX_BLOCK = 1 << 18  # sentences or documents

Advance = Callable[[int], None]
"""Told how many bytes more have been looked at."""


@dataclass
class Found:
    """Tokens of one kind: how many, and the place of the first."""

    count: int = 0
    first: int = -1

    def add_(self, is_such: npt.NDArray[np.bool_], *, offset: int) -> None:
        """Count those of a block that begins with token ``offset``."""
        count = int(np.count_nonzero(is_such))
        if count and not self.count:
            self.first = offset + int(is_such.argmax())
        self.count += count


@dataclass
class TokenScan:
    """What the .bin holds."""

    special: dict[str, Found]
    """Occurrences of each special token, where the vocabulary is known."""
    smallest_id: int = np.iinfo(np.int64).max
    largest_id: int = -1
    outside: Found = field(default_factory=Found)
    """Ids below 0, or not in the vocabulary."""
    sha256: str = ""


@dataclass
class Shares:
    """Documents that a kind of sample can use, with what they hold."""

    documents: int = 0
    sentences: int = 0
    tokens: int = 0

    def add_(self, is_usable: npt.NDArray[np.bool_], sentences: Ints, tokens: Ints) -> None:
        """Count the usable ones among documents with so many sentences and tokens."""
        self.documents += int(is_usable.sum())
        self.sentences += int(sentences[is_usable].sum())
        self.tokens += int(tokens[is_usable].sum())


@dataclass
class IndexScan:
    """What the .idx says."""

    longest_sentence: int = 0
    long_sentences: int = 0
    """Sentences of more than `LONG_SENTENCE` tokens."""
    with_text: Shares = field(default_factory=Shares)
    """Documents that have a sentence."""
    with_pairs: Shares = field(default_factory=Shares)
    """Documents that have two sentences or more."""
    tokens_per_document: Ints = field(default_factory=lambda: np.zeros(64, dtype=np.int64))
    """``[64]`` documents without tokens, with 1, with 2 to 3, with 4 to 7, ..."""


def scan_index(corpus: Corpus, advance: Advance) -> IndexScan:
    """Lengths and document boundaries, block by block."""
    scan = IndexScan()
    for first in range(0, corpus.num_sentences, _INDEX_BLOCK):
        lengths = corpus.lengths[first : first + _INDEX_BLOCK]
        scan.longest_sentence = max(scan.longest_sentence, int(lengths.max()))
        scan.long_sentences += int(np.count_nonzero(lengths > LONG_SENTENCE))
        advance(lengths.nbytes + len(lengths) * corpus.pointers.itemsize)
        release(corpus.lengths)
    for first in range(0, corpus.num_documents, _INDEX_BLOCK):
        boundaries = corpus.documents[first : first + _INDEX_BLOCK + 1]
        sentences, tokens = np.diff(boundaries), np.diff(corpus.starts_of(boundaries))
        scan.with_text.add_(sentences >= 1, sentences, tokens)
        scan.with_pairs.add_(sentences >= 2, sentences, tokens)
        # frexp: tokens = fraction * 2**exponent with a fraction in [0.5, 1), so the exponent is the bit length.
        scan.tokens_per_document += np.bincount(np.frexp(tokens)[1], minlength=64)
        advance(sentences.nbytes)
        release(corpus.documents)
        release(corpus.pointers)
    return scan


def scan_tokens(
    corpus: Corpus, path: Path, *, vocab_size: int | None, special: Mapping[str, int], advance: Advance
) -> TokenScan:
    """Every id of the .bin at ``path``, and its SHA-256; ``special`` are the ids of the special tokens.

    Read, not mapped: that is faster, and memory stays small however the kernel keeps the pages.
    """
    scan, sha256 = TokenScan({name: Found() for name in special}), hashlib.sha256()
    buffer = np.empty(_BLOCK, corpus.tokens.dtype)
    with open_plain(path) as file, reading(path), ThreadPoolExecutor(1) as pool:
        for offset in range(0, corpus.num_tokens, _BLOCK):
            block = buffer[: min(_BLOCK, corpus.num_tokens - offset)]
            read_array(file, block, offset=offset * block.itemsize)
            hashed = pool.submit(sha256.update, block.view(np.uint8).data)
            _count_(scan, block, offset=offset, vocab_size=vocab_size, special=special)
            hashed.result()
            advance(block.nbytes)
    scan.sha256 = sha256.hexdigest()
    return scan


def _count_(
    scan: TokenScan,
    block: npt.NDArray[Any],
    *,
    offset: int,
    vocab_size: int | None,
    special: Mapping[str, int],
) -> None:
    smallest, largest = int(block.min()), int(block.max())
    scan.smallest_id, scan.largest_id = min(scan.smallest_id, smallest), max(scan.largest_id, largest)
    limit = largest + 1 if vocab_size is None else vocab_size
    if smallest < 0 or largest >= limit:
        scan.outside.add_((block < 0) | (block >= limit), offset=offset)
    for name, number in special.items():
        if number <= largest:  # also: a larger one need not fit the type of the block
            scan.special[name].add_(block == number, offset=offset)
