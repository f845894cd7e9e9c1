"""Text to token ids, in this process or in several, in the order of the input whoever is done first."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.config.environment import set_where_unset
from megatron_bert_tp.data.preprocessing.documents import InputCounts
from megatron_bert_tp.data.preprocessing.pieces import Piece, Place
from megatron_bert_tp.data.preprocessing.sentences import split_sentences
from megatron_bert_tp.data.preprocessing.word_cache import WordCache
from megatron_bert_tp.data.tokenizer import Tokenizer
from megatron_bert_tp.errors import DataError


@dataclass(frozen=True)
class Chunk:
    """Pieces of documents that are encoded together, and where the input stands after them."""

    pieces: list[Piece]
    next: Place
    counts: InputCounts
    """What reading had met up to here."""
    num_packed: int
    """Bytes of the current file that had been read."""

    @property
    def num_bytes(self) -> int:
        """Unpacked bytes of the pieces."""
        return sum(piece.num_bytes for piece in self.pieces)


class Encoding(NamedTuple):
    """How text becomes ids."""

    tokenizer_path: Path
    tokenizer_sha256: str
    lowercase: bool
    sentence_per_line: bool
    language: str


class EncodedChunk(NamedTuple):
    """The ids of a chunk."""

    tokens: npt.NDArray[np.integer]
    """``[tokens]`` of all sentences, back to back."""
    lengths: npt.NDArray[np.integer]
    """``[sentences]`` tokens of each, at least one."""
    ends: npt.NDArray[np.integer]
    """``[documents]`` sentences of the chunk up to the end of each document."""
    empty_sentences: int
    """Sentences without a token, which are left out."""
    unknown: int
    """Tokens that are [UNK]."""


def encoded_chunks(
    chunks: Iterable[Chunk], encoding: Encoding, workers: int
) -> Generator[tuple[Chunk, EncodedChunk], None, None]:
    """Chunks and their ids in the order of the input."""
    if workers == 1:
        yield from ((chunk, _encode(_texts(chunk), encoding)) for chunk in chunks)
        return
    # Spawned: the threads that `tokenizers` may have started here would not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    waiting: deque[tuple[Chunk, Future[EncodedChunk]]] = deque()
    try:
        for chunk in chunks:
            with _interrupts_held():  # what starts a worker hands this down to it, for good
                waiting.append((chunk, pool.submit(_encode, _texts(chunk), encoding)))
            if len(waiting) > 2 * workers:
                yield _result(waiting)
        while waiting:
            yield _result(waiting)
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process ended by itself, most likely for lack of memory; run the same command again with "
            f"fewer --workers than {workers}"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Context manager in which Ctrl-C waits; it is the parent's to handle, also while a worker starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _result(waiting: deque[tuple[Chunk, Future[EncodedChunk]]]) -> tuple[Chunk, EncodedChunk]:
    chunk, future = waiting.popleft()
    return chunk, future.result()


def _texts(chunk: Chunk) -> list[tuple[str, bool]]:
    return [(piece.text, piece.ends_document) for piece in chunk.pieces]


def _start_worker() -> None:
    """One thread for each worker, and no worker outlives the parent."""
    set_where_unset({"TOKENIZERS_PARALLELISM": "false"})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@lru_cache(maxsize=1)
def _word_cache(path: Path, sha256: str, lowercase: bool) -> tuple[WordCache, int]:
    tokenizer = Tokenizer.load(path, lowercase)
    if tokenizer.sha256 != sha256:
        raise DataError(f"{path}: was changed while `preprocess` runs; run the same command again")
    return WordCache(tokenizer), tokenizer.vocabulary.unknown_id


def _encode(texts: list[tuple[str, bool]], encoding: Encoding) -> EncodedChunk:
    words, unknown_id = _word_cache(encoding.tokenizer_path, encoding.tokenizer_sha256, encoding.lowercase)
    sentences: list[str] = []
    ends: list[int] = []
    for text, ends_document in texts:
        sentences += split_sentences(
            text, sentence_per_line=encoding.sentence_per_line, language=encoding.language
        )
        if ends_document:
            ends.append(len(sentences))
    tokens, lengths = words.encode(sentences)
    full = lengths > 0
    # Ends count the sentences that are kept.
    kept = np.concatenate([[0], np.cumsum(full)])
    return EncodedChunk(
        tokens=tokens,
        lengths=lengths[full].astype(np.int32),
        ends=kept[np.array(ends, dtype=np.int64)],
        empty_sentences=int((~full).sum()),
        unknown=int(np.count_nonzero(tokens == unknown_id)),
    )
