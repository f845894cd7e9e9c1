"""Writing of a corpus, sentence by sentence, so that a kill leaves no half-made one behind."""

import hashlib
import os
from array import array
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.data.corpus import HEADER, MAGIC, TOKEN_TYPES, VERSION, CorpusFacts, corpus_paths
from megatron_bert_tp.data.refusals import writing
from megatron_bert_tp.data.tokenizer import Tokenizer
from megatron_bert_tp.errors import DataError

_CODES = {dtype: code for code, dtype in TOKEN_TYPES.items()}


def token_type(vocab_size: int) -> np.dtype[np.uint16] | np.dtype[np.int32]:
    """Megatron-LM's choice of the number format of a token."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class CorpusWriter:
    """Context manager that writes PREFIX.bin, .idx and .json under temporary names and renames them at the end.

    Leaving it by an exception, or with no document added (DataError), removes what was written.  DataError
    too where nothing can be written, or no more.
    """

    def __init__(self, prefix: Path, tokenizer: Tokenizer):
        self._paths = corpus_paths(prefix)
        self._tokenizer = tokenizer
        self._token_type = token_type(tokenizer.size)
        self._lengths = array("i")
        self._documents = array("q", [0])
        self._sha256 = hashlib.sha256()
        self._num_tokens = 0
        self._largest_id = -1
        with writing(self._paths[0]):
            prefix.parent.mkdir(parents=True, exist_ok=True)
            self._bin: BinaryIO = _temporary(self._paths[0]).open("wb")

    def add_document(self, tokens: npt.NDArray[np.integer], lengths: Sequence[int]) -> None:
        """Append one document: the ids of its sentences back to back, and the tokens of each (>= 1)."""
        if not len(lengths) or min(lengths) < 1 or sum(lengths) != len(tokens):
            raise ValueError("a document has sentences of at least one token that add up to its tokens")
        content = tokens.astype(self._token_type).tobytes()
        with writing(self._paths[0]):
            self._bin.write(content)
        self._sha256.update(content)
        self._lengths.extend(lengths)
        self._documents.append(len(self._lengths))
        self._num_tokens += len(tokens)
        self._largest_id = max(self._largest_id, int(tokens.max()))

    @property
    def facts(self) -> CorpusFacts:
        """What has been written so far."""
        return CorpusFacts(
            documents=len(self._documents) - 1,
            sentences=len(self._lengths),
            tokens=self._num_tokens,
            largest_id=self._largest_id,
            bin_sha256=self._sha256.hexdigest(),
            vocab_size=self._tokenizer.size,
            tokenizer_sha256=self._tokenizer.sha256,
            lowercase=self._tokenizer.lowercase,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Closing writes what is buffered, so on a full disk it fails as well: the files are removed before it.
        with writing(self._paths[0]), closing(self._bin):
            try:
                if kind is None:
                    self._finish()
            finally:
                for path in self._paths:
                    _temporary(path).unlink(missing_ok=True)

    def _finish(self) -> None:
        if not self._num_tokens:
            raise DataError(
                f"{self._paths[0]}: the input has no sentence with a token, so there is nothing to write"
            )
        _, idx_path, facts_path = self._paths
        _flush(self._bin)
        with _temporary(idx_path).open("wb") as file:
            self._write_index(file)
            _flush(file)
        self.facts.write(_temporary(facts_path))
        # The old index goes first: a kill in between leaves "no .idx" and never two halves of two corpora.
        idx_path.unlink(missing_ok=True)
        for path in (self._paths[0], facts_path, idx_path):
            _temporary(path).replace(path)

    def _write_index(self, file: BinaryIO) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        code = _CODES[self._token_type]
        file.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(self._documents)))
        file.write(lengths.astype("<i4").tobytes())
        file.write((pointers * self._token_type.itemsize).astype("<i8").tobytes())
        file.write(np.frombuffer(self._documents, dtype=np.int64).astype("<i8").tobytes())


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.unfinished")


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
