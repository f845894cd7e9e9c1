"""Writing of a corpus under temporary names: a kill leaves no half-made one, and writing can go on after it."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.data.corpus.facts import CorpusFacts, Report, corpus_paths, temporary
from megatron_bert_tp.data.corpus.index import HEADER, MAGIC, TOKEN_TYPES, VERSION, index_digest
from megatron_bert_tp.data.refusals import writing
from megatron_bert_tp.data.tokenizer import Tokenizer
from megatron_bert_tp.errors import DataError

_CODES = {dtype: code for code, dtype in TOKEN_TYPES.items()}
_BLOCK = 1 << 20  # numbers, or bytes, that are copied at once

Ints = npt.NDArray[np.integer]


def token_type(vocab_size: int) -> np.dtype[np.uint16] | np.dtype[np.int32]:
    """Megatron-LM's choice of the number format of a token."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


@dataclass(frozen=True, kw_only=True)
class Written:
    """How much of a corpus has been written; all that is needed to go on."""

    tokens: int = 0
    sentences: int = 0
    documents: int = 0
    closed_sentences: int = 0
    """Sentences up to the end of the last document."""
    closed_tokens: int = 0
    largest_id: int = -1


class Documents(NamedTuple):
    """The documents that were closed by what was added."""

    tokens: Ints
    """``[documents]`` tokens of each."""
    sentences: Ints
    """``[documents]`` sentences of each."""
    dropped: int
    """Documents without a sentence, which the corpus leaves out."""


class CorpusWriter:
    """Context manager that writes PREFIX.bin, .idx and .json under temporary names and renames them at the end.

    Lengths and boundaries wait in temporary files too, so that memory does not grow with the corpus.  Leaving
    it by an exception removes what was written, unless ``keep`` was set.  DataError where nothing can be
    written, or no more, or with no document added.  See `only_writer` where another process may write, too.
    """

    def __init__(self, prefix: Path, tokenizer: Tokenizer, *, begun: Written | None = None):
        self.keep = False
        """Whether an exception leaves the temporary files for a later run."""
        self.written = begun or Written()
        self._prefix, self._paths = prefix, corpus_paths(prefix)
        self._tokenizer = tokenizer
        self._token_type = token_type(tokenizer.size)
        self._sha256 = hashlib.sha256()
        self._is_published = False
        with writing(self._paths[0]):
            prefix.parent.mkdir(parents=True, exist_ok=True)
            self._files = [_open(path) for path in temporary_paths(prefix)]
            with ExitStack() as opened:
                for file in self._files:
                    opened.push(file)
                self._go_on()
                opened.pop_all()

    def add_document(self, tokens: Ints, lengths: Sequence[int]) -> None:
        """Append one document: the ids of its sentences back to back, and the tokens of each (>= 1)."""
        if not len(lengths):
            raise ValueError("a document has at least one sentence")
        self.add(tokens, np.asarray(lengths), np.array([len(lengths)]))

    def add(self, tokens: Ints, lengths: Ints, ends: Ints) -> Documents:
        """Append sentences: ids back to back, tokens of each (>= 1), and after how many each document ends.

        What follows the last of ``ends`` is the beginning of a document that goes on with the next call.
        """
        if (len(lengths) and lengths.min() < 1) or lengths.sum() != len(tokens):
            raise ValueError("sentences have at least one token each and add up to the tokens")
        before = self.written
        sums = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        sentence_ends = np.concatenate([[before.closed_sentences], before.sentences + ends]).astype(np.int64)
        token_ends = np.concatenate([[before.closed_tokens], before.tokens + sums[ends]]).astype(np.int64)
        kept = np.diff(sentence_ends) > 0
        content = tokens.astype(self._token_type, copy=False).tobytes()
        with writing(self._paths[0]):
            self._files[0].write(content)
            self._files[1].write(lengths.astype("<i4").tobytes())
            self._files[2].write(sentence_ends[1:][kept].astype("<i8").tobytes())
        self._sha256.update(content)
        self.written = Written(
            tokens=before.tokens + len(tokens),
            sentences=before.sentences + len(lengths),
            documents=before.documents + int(kept.sum()),
            closed_sentences=int(sentence_ends[-1]),
            closed_tokens=int(token_ends[-1]),
            largest_id=max(before.largest_id, int(tokens.max()) if len(tokens) else -1),
        )
        return Documents(np.diff(token_ends)[kept], np.diff(sentence_ends)[kept], int((~kept).sum()))

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        with writing(self._paths[0]):
            for file in self._files:
                file.flush()
                os.fsync(file.fileno())

    @property
    def facts(self) -> CorpusFacts:
        """What has been written so far."""
        return self._facts()

    def prepare(self, report: Report | None = None) -> CorpusFacts:
        """Complete the temporary files: after this, `publish` can be called, also by a later process."""
        if not self.written.documents:
            raise DataError(
                f"{self._paths[0]}: the input has no sentence with a token, so there is nothing to write"
            )
        self.sync()
        with writing(self._paths[1]):
            with temporary(self._paths[1]).open("wb") as file:
                index_sha256 = self._write_index(file)
                file.flush()
                os.fsync(file.fileno())
            facts = replace(self._facts(), index_sha256=index_sha256, report=report)
            facts.write(temporary(self._paths[2]))
        return facts

    def publish(self) -> None:
        """Give the files their names."""
        publish(self._prefix)
        self._is_published = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Closing writes what is buffered, so on a full disk it fails as well: the files are removed before it.
        with writing(self._paths[0]), ExitStack() as closed:
            for file in self._files:
                closed.push(file)
            try:
                if kind is None and not self._is_published:
                    self.prepare()
                    self.publish()
            finally:
                if not self.keep:
                    discard(self._prefix)

    def _facts(self) -> CorpusFacts:
        return CorpusFacts(
            documents=self.written.documents,
            sentences=self.written.sentences,
            tokens=self.written.tokens,
            largest_id=self.written.largest_id,
            bin_sha256=self._sha256.hexdigest(),
            vocab_size=self._tokenizer.size,
            tokenizer_sha256=self._tokenizer.sha256,
            lowercase=self._tokenizer.lowercase,
        )

    def _go_on(self) -> None:
        """Cut the temporary files to what counts as written, and hash the tokens."""
        for file, size in zip(self._files, self._sizes(), strict=True):
            file.truncate(size)
        for block in iter(lambda: self._files[0].read(_BLOCK), b""):
            self._sha256.update(block)
        for file in self._files:
            file.seek(0, os.SEEK_END)
        if not self.written.tokens:
            self._files[2].write(np.zeros(1, dtype="<i8").tobytes())

    def _sizes(self) -> tuple[int, int, int]:
        boundaries = self.written.documents + 1 if self.written.tokens else 0
        return self.written.tokens * self._token_type.itemsize, self.written.sentences * 4, boundaries * 8

    def _write_index(self, file: BinaryIO) -> str:
        """Write the .idx; returns its digest."""
        code = _CODES[self._token_type]
        _, lengths, documents = self._files
        counts = (self.written.sentences, self.written.documents + 1)
        digest = index_digest(self._token_type.itemsize, *counts)
        file.write(HEADER.pack(MAGIC, VERSION, code, *counts))
        for block in _blocks(lengths):
            digest.update(block)
            file.write(block)
        lengths.seek(0)
        first = 0
        while block := lengths.read(4 * _BLOCK):
            sums = first + np.cumsum(np.frombuffer(block, "<i4"), dtype=np.int64) * self._token_type.itemsize
            file.write(np.concatenate([[first], sums[:-1]]).astype("<i8").tobytes())
            first = int(sums[-1])
        for block in _blocks(documents):
            digest.update(block)
            file.write(block)
        return digest.hexdigest()


def temporary_paths(prefix: Path) -> tuple[Path, Path, Path]:
    """Temporary files of the tokens, of the lengths of sentences and of the boundaries of documents."""
    tokens, lengths, documents = (temporary(Path(f"{prefix}.{name}")) for name in ("bin", "lengths", "documents"))
    return tokens, lengths, documents


def publish(prefix: Path) -> None:
    """Rename the complete temporary files of a corpus; a second call ends what a killed first one began."""
    bin_path, idx_path, facts_path = corpus_paths(prefix)
    with writing(bin_path):
        # The old index goes first: a kill in between leaves "no .idx" and never two halves of two corpora.
        if temporary(idx_path).exists():
            idx_path.unlink(missing_ok=True)
        for path in (bin_path, facts_path, idx_path):
            if temporary(path).exists():
                temporary(path).replace(path)


def discard(prefix: Path) -> None:
    """Remove the temporary files of a corpus."""
    for path in (*temporary_paths(prefix), *map(temporary, corpus_paths(prefix))):
        path.unlink(missing_ok=True)


def _open(path: Path) -> BinaryIO:
    """Open for reading and writing, without cutting what is there."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    return iter(lambda: file.read(_BLOCK), b"")
