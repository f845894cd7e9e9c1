r"""Tokenised corpora in Megatron-LM's format (MMIDIDX version 1), one sequence a sentence: PREFIX.bin and .idx.

The .idx, little endian::

    "MMIDIDX\0\0"  u64 version = 1   u8 type   u64 sentences   u64 boundaries      34 bytes
    i32[sentences]   tokens of each sentence
    i64[sentences]   byte of the .bin at which each sentence begins
    i64[boundaries]  first sentence of each document, then the number of sentences
"""

import json
import struct
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.errors import DataError

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
_TYPE_NAMES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
TOKEN_TYPES = {code: np.dtype(name) for code, name in _TYPE_NAMES.items()}
_SCANNED_ALWAYS = 100_000_000  # tokens; their scan takes under 0.1 s
_SCAN_BLOCK = 1 << 24  # tokens


@dataclass(frozen=True, kw_only=True)
class CorpusFacts:
    """What PREFIX.json says of a corpus."""

    documents: int
    sentences: int
    tokens: int
    largest_id: int
    bin_sha256: str
    vocab_size: int
    tokenizer_sha256: str
    lowercase: bool

    def write(self, path: Path) -> None:
        """Save as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "CorpusFacts":
        """Facts of a JSON file; DataError when it holds anything else."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error}); remove it or run `preprocess` again") from error
        types = {field.name: field.type for field in fields(cls)}
        if not isinstance(content, dict) or {k: type(v) for k, v in content.items()} != types:
            raise DataError(
                f"{path}: the facts of a corpus have exactly the keys {', '.join(types)}; "
                "move the file away or run `preprocess` again"
            )
        return cls(**content)


@dataclass(frozen=True)
class Corpus:
    """A memory-mapped corpus whose index has been checked."""

    prefix: Path
    tokens: npt.NDArray[Any]
    """``[tokens]`` ids of all sentences, back to back."""
    starts: npt.NDArray[np.int64]
    """``[sentences + 1]`` first token of each sentence, then the number of tokens."""
    documents: npt.NDArray[np.int64]
    """``[documents + 1]`` first sentence of each document, then the number of sentences."""
    facts: CorpusFacts | None
    """None for a corpus that was not made by this package."""

    @classmethod
    def open(cls, prefix: Path) -> "Corpus":
        """Map PREFIX.bin; DataError when a file is missing or damaged or the two do not belong together."""
        bin_path, idx_path, facts_path = corpus_paths(prefix)
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise DataError(
                    f"{path}: no such file; make it with {_MAKE_IT}; data.corpus is its PREFIX, without an ending"
                )
        index = _read_index(idx_path)
        starts = _check_index(index, bin_path, idx_path)
        tokens = np.asarray(np.memmap(bin_path, dtype=index.token_type, mode="r"))
        facts = CorpusFacts.read(facts_path) if facts_path.is_file() else None
        corpus = cls(prefix, tokens, starts, index.documents, facts)
        corpus._check_facts()
        return corpus

    @property
    def num_documents(self) -> int:
        """Documents, those without sentences included."""
        return len(self.documents) - 1

    @property
    def num_sentences(self) -> int:
        """Sentences of all documents."""
        return len(self.starts) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of all sentences."""
        return len(self.tokens)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """``[sentences]`` tokens of each sentence."""
        return np.diff(self.starts)

    def sentence(self, number: int) -> npt.NDArray[Any]:
        """Token ids of one sentence, a view into the file."""
        return self.tokens[self.starts[number] : self.starts[number + 1]]

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


def corpus_paths(prefix: Path) -> tuple[Path, Path, Path]:
    """PREFIX.bin, PREFIX.idx and PREFIX.json."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


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


def check_token_ids(corpus: Corpus, vocab_size: int) -> None:
    """DataError naming the first sentence with an id outside 0..vocab_size-1.

    Scans all tokens; from 100 million tokens on, PREFIX.json's largest id is believed where there is one.
    """
    facts = corpus.facts
    if facts is not None and corpus.num_tokens > _SCANNED_ALWAYS and facts.largest_id < vocab_size:
        return
    for first in range(0, corpus.num_tokens, _SCAN_BLOCK):
        block = corpus.tokens[first : first + _SCAN_BLOCK]
        if block.min() >= 0 and block.max() < vocab_size:
            continue
        position = first + int(np.flatnonzero((block < 0) | (block >= vocab_size))[0])
        sentence = int(np.searchsorted(corpus.starts, position, side="right")) - 1
        raise DataError(
            f"{corpus.prefix}.bin: token ids must lie in 0..{vocab_size - 1}, but sentence {sentence} holds "
            f"{int(corpus.tokens[position])}; use the tokenizer that made the corpus, "
            "and a vocab_size of at least its size"
        )


@dataclass(frozen=True)
class _Index:
    token_type: np.dtype[Any]
    lengths: npt.NDArray[np.int32]
    pointers: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]


def _read_index(path: Path) -> _Index:
    """Arrays of an .idx whose magic, version, type code and size are right."""
    size = path.stat().st_size
    if size < HEADER.size:
        raise DataError(f"{path}: an index has at least {HEADER.size} bytes, this file has {size}; {_DAMAGED}")
    with path.open("rb") as file:
        magic, version, code, sentences, boundaries = HEADER.unpack(file.read(HEADER.size))
    if magic != MAGIC:
        raise DataError(f"{path}: begins with {magic!r}, not {MAGIC!r}: not an index of Megatron-LM's format")
    if version != VERSION or code not in TOKEN_TYPES:
        raise DataError(
            f"{path}: version {version} with type code {code} cannot be read, only version {VERSION} with "
            f"an integer type {sorted(TOKEN_TYPES)}; {_DAMAGED}"
        )
    expected = HEADER.size + 12 * sentences + 8 * boundaries
    if size != expected:
        raise DataError(
            f"{path}: {sentences} sentences and {boundaries} document boundaries take {expected} bytes, "
            f"the file has {size}; {_DAMAGED}"
        )
    content = np.memmap(path, dtype=np.uint8, mode="r")
    lengths, pointers, documents = np.split(content[HEADER.size :], [4 * sentences, 12 * sentences])
    return _Index(TOKEN_TYPES[code], lengths.view("<i4"), pointers.view("<i8"), np.array(documents.view("<i8")))


def _check_index(index: _Index, bin_path: Path, idx_path: Path) -> npt.NDArray[np.int64]:
    """First token of each sentence and the number of tokens, once all numbers are known to agree."""
    size = bin_path.stat().st_size
    num_sentences, documents = len(index.lengths), index.documents
    if num_sentences == 0 or len(documents) < 2 or size == 0:
        raise DataError(
            f"{idx_path}: an empty corpus ({num_sentences} sentences, {max(len(documents) - 1, 0)} documents, "
            f"{size} bytes of tokens); make it with {_MAKE_IT}"
        )
    shortest = int(np.argmin(index.lengths))
    if index.lengths[shortest] < 1:
        raise DataError(
            f"{idx_path}: sentence {shortest} has {index.lengths[shortest]} tokens, not 1 or more; {_DAMAGED}"
        )
    starts = np.zeros(num_sentences + 1, dtype=np.int64)
    np.cumsum(index.lengths, dtype=np.int64, out=starts[1:])
    expected = int(starts[-1]) * index.token_type.itemsize
    if size != expected:
        raise DataError(
            f"{bin_path}: the index {idx_path.name} expects {expected} bytes, the file has {size}: "
            f"it is cut short or belongs to another index; {_DAMAGED}"
        )
    wrong = np.flatnonzero(index.pointers != starts[:-1] * index.token_type.itemsize)
    if len(wrong):
        first = int(wrong[0])
        raise DataError(
            f"{idx_path}: sentence {first} must begin at byte {int(starts[first]) * index.token_type.itemsize}, "
            f"the index says {int(index.pointers[first])}; {_DAMAGED}"
        )
    if documents[0] != 0 or documents[-1] != num_sentences or np.any(documents[1:] < documents[:-1]):
        raise DataError(
            f"{idx_path}: document boundaries must rise from 0 to {num_sentences} (the sentences), "
            f"these go from {int(documents[0])} to {int(documents[-1])} or fall between; {_DAMAGED}"
        )
    return starts


_MAKE_IT = "`python -m megatron_bert_tp.preprocess INPUT... --tokenizer FILE --output PREFIX`"
_DAMAGED = "the corpus is damaged: copy it again or run `preprocess` again"
