"""Text files to a tokenised corpus, with the same bytes for any number of worker processes."""

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.data.byte_progress import ByteProgress
from megatron_bert_tp.data.corpus import CorpusFacts, corpus_paths
from megatron_bert_tp.data.corpus_writer import CorpusWriter
from megatron_bert_tp.data.text import Document, TextLayout, check_inputs, read_documents, split_sentences
from megatron_bert_tp.data.tokenizer import Tokenizer, train_wordpiece
from megatron_bert_tp.errors import DataError

_CHUNK = 1 << 19  # bytes of text that a worker gets at once


@dataclass(frozen=True)
class PreprocessReport:
    """What became of the input."""

    facts: CorpusFacts
    dropped_documents: int
    """Documents in which no sentence had a token."""
    num_bytes: int
    seconds: float

    def __str__(self) -> str:
        facts = self.facts
        speed = self.num_bytes / 1e6 / self.seconds
        return (
            f"{facts.documents:,} documents ({self.dropped_documents:,} without a token dropped), "
            f"{facts.sentences:,} sentences, {facts.tokens:,} tokens; {self.num_bytes / 1e6:.1f} MB in "
            f"{self.seconds:.1f} s ({speed:.2f} MB/s); .bin SHA-256 {facts.bin_sha256}"
        )


def preprocess(
    inputs: list[Path],
    tokenizer_path: Path,
    output: Path,
    *,
    layout: TextLayout | None = None,
    lowercase: bool = True,
    workers: int = 1,
) -> PreprocessReport:
    """Tokenise ``inputs`` into the corpus ``output``.bin, .idx and .json.

    One worker is this process with the threads of `tokenizers`; more are processes of their own.
    DataError when an input or the tokenizer cannot be used, or ``output`` would replace an input.
    """
    started = time.monotonic()
    layout = layout or TextLayout()
    total = check_inputs(inputs)
    _check_output(inputs, output)
    tokenizer = Tokenizer.load(tokenizer_path, lowercase)
    encoding = _Encoding(tokenizer_path, lowercase, layout.sentence_per_line)
    dropped = 0
    with ByteProgress("tokenising", total) as progress, CorpusWriter(output, tokenizer) as writer:
        for chunk in _encoded_chunks(_chunks(inputs, layout), encoding, workers):
            dropped += _write(writer, chunk)
            progress.advance(chunk.num_bytes)
    return PreprocessReport(writer.facts, dropped, total, time.monotonic() - started)


def train_tokenizer(
    inputs: list[Path], output: Path, *, size: int, layout: TextLayout | None = None, lowercase: bool = True
) -> int:
    """Train a WordPiece vocabulary on the text of ``inputs``, write it to ``output`` and return its size."""
    layout = layout or TextLayout()
    check_inputs(inputs)
    texts = (document.text for path in inputs for document in read_documents(path, layout))
    return train_wordpiece(texts, size, lowercase, output)


class _Encoding(NamedTuple):
    tokenizer_path: Path
    lowercase: bool
    sentence_per_line: bool


class _EncodedChunk(NamedTuple):
    tokens: npt.NDArray[np.int32]
    """``[tokens]`` of all documents of the chunk, back to back."""
    lengths: list[list[int]]
    """Tokens of each sentence of each document."""
    num_bytes: int


def _check_output(inputs: list[Path], output: Path) -> None:
    replaced = {path.resolve() for path in corpus_paths(output)} & {path.resolve() for path in inputs}
    if replaced:
        raise DataError(f"--output {output} would replace the input {replaced.pop()}; choose another prefix")


def _chunks(inputs: list[Path], layout: TextLayout) -> Iterator[list[Document]]:
    """Documents of all files in order, in lists of about half a megabyte."""
    chunk: list[Document] = []
    size = 0
    for path in inputs:
        for document in read_documents(path, layout):
            chunk.append(document)
            size += document.num_bytes
            if size >= _CHUNK:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def _encoded_chunks(
    chunks: Iterable[list[Document]], encoding: _Encoding, workers: int
) -> Iterator[_EncodedChunk]:
    """Encoded chunks in the order of the input, whichever worker is done first."""
    if workers == 1:
        yield from (_encode(chunk, encoding) for chunk in chunks)
        return
    # Spawned: the threads that `tokenizers` may have started here would not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        waiting: deque[Future[_EncodedChunk]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_encode, chunk, encoding))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _one_thread() -> None:
    """Keep `tokenizers` from starting a thread per core in every worker."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@cache
def _worker_tokenizer(path: Path, lowercase: bool) -> Tokenizer:
    return Tokenizer.load(path, lowercase)


def _encode(chunk: list[Document], encoding: _Encoding) -> _EncodedChunk:
    tokenizer = _worker_tokenizer(encoding.tokenizer_path, encoding.lowercase)
    documents = [split_sentences(d.text, sentence_per_line=encoding.sentence_per_line) for d in chunk]
    encoded = iter(tokenizer.encode_batch([sentence for document in documents for sentence in document]))
    tokens: list[int] = []
    lengths: list[list[int]] = []
    for document in documents:
        sentences = [ids for ids in islice(encoded, len(document)) if ids]
        lengths.append([len(ids) for ids in sentences])
        for ids in sentences:
            tokens.extend(ids)
    return _EncodedChunk(np.array(tokens, dtype=np.int32), lengths, sum(d.num_bytes for d in chunk))


def _write(writer: CorpusWriter, chunk: _EncodedChunk) -> int:
    """Write the documents of a chunk; returns how many had no token."""
    dropped = 0
    first = 0
    for lengths in chunk.lengths:
        if not lengths:
            dropped += 1
            continue
        last = first + sum(lengths)
        writer.add_document(chunk.tokens[first:last], lengths)
        first = last
    return dropped
