"""Text files to a tokenised corpus, with the same bytes for any number of workers and any number of kills."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path

from megatron_bert_tp.data.byte_progress import ByteProgress
from megatron_bert_tp.data.corpus.facts import CorpusFacts, corpus_paths
from megatron_bert_tp.data.corpus.lock import only_writer
from megatron_bert_tp.data.corpus.writer import CorpusWriter, discard, publish, token_type
from megatron_bert_tp.data.preprocessing.documents import TextLayout, check_inputs, read_file
from megatron_bert_tp.data.preprocessing.encoding import Chunk, EncodedChunk, Encoding, encoded_chunks
from megatron_bert_tp.data.preprocessing.journal import Beginning, Journal, Mark, Request
from megatron_bert_tp.data.preprocessing.languages import language_code
from megatron_bert_tp.data.preprocessing.pieces import Piece
from megatron_bert_tp.data.preprocessing.report import PreprocessReport, report_of
from megatron_bert_tp.data.tokenizer import Tokenizer
from megatron_bert_tp.errors import DataError

CHUNK = 1 << 19
"""Bytes of text that a worker gets at once."""
_JOURNAL_SECONDS = 3.0


def preprocess(
    inputs: list[Path],
    tokenizer_path: Path,
    output: Path,
    *,
    layout: TextLayout | None = None,
    lowercase: bool = True,
    language: str = "en",
    workers: int = 1,
    overwrite: bool = False,
    journal_seconds: float = _JOURNAL_SECONDS,
) -> PreprocessReport:
    """Tokenise ``inputs`` into the corpus ``output``.bin, .idx and .json.

    One worker is this process; more are processes of their own.  Where an earlier call for the same corpus was
    cut off, this one goes on from its journal, which is saved every ``journal_seconds``.  DataError when an
    input or the tokenizer cannot be used, or the corpus exists and ``overwrite`` was not given.
    """
    layout = layout or TextLayout()
    check_inputs(inputs)
    _check_output([*inputs, tokenizer_path], output)
    tokenizer = Tokenizer.load(tokenizer_path, lowercase)
    language = language_code(language)
    options = asdict(layout) | {
        "invalid_text": layout.invalid_text.value,
        "language": language,
        "lowercase": tokenizer.lowercase,
        "tokenizer": tokenizer.sha256,
    }
    encoding = Encoding(tokenizer_path, tokenizer.sha256, lowercase, layout.sentence_per_line, language)
    before = [0, *accumulate(path.stat().st_size for path in inputs)]
    run = _Run(inputs, before, layout, encoding, workers, journal_seconds)
    journal = Journal(output, Request.of(inputs, options))
    with only_writer(output):  # before the journal is read: another process may be at work on it
        beginning = journal.begin(token_type(tokenizer.size).itemsize)
        if beginning.is_complete:
            return _publish(output, journal, beginning)
        _check_absent(output, overwrite)
        _tell(output, beginning, inputs)
        _tell_case(tokenizer, tokenizer_path)
        if beginning.refused:
            journal.remove()
        return _make(run, output, tokenizer, journal, beginning.mark)


@dataclass(frozen=True)
class _Run:
    inputs: list[Path]
    before: list[int]
    """``[files + 1]`` bytes of all files before each."""
    layout: TextLayout
    encoding: Encoding
    workers: int
    journal_seconds: float


def _make(run: _Run, output: Path, tokenizer: Tokenizer, journal: Journal, done: Mark) -> PreprocessReport:
    """Write the corpus from ``done`` on, and give its files their names."""
    started = time.monotonic()
    with CorpusWriter(output, tokenizer, begun=done.written) as writer:
        if done != Mark():
            _save(writer, journal)
        with ByteProgress("tokenising", run.before[-1], done=run.before[done.place.file]) as progress:
            mark = _run(run, writer, journal, done, progress)
        facts = writer.prepare(report_of(mark.tally, mark.counts, num_tokens=mark.written.tokens))
        writer.keep = True  # first: an interrupt must not remove what the journal says is whole
        journal.save(facts)
        writer.publish()
    discard(output)
    journal.remove()
    run_bytes = mark.tally.num_bytes - done.tally.num_bytes
    return PreprocessReport(facts, mark.tally, mark.counts, time.monotonic() - started, run_bytes)


def _run(run: _Run, writer: CorpusWriter, journal: Journal, begun: Mark, progress: ByteProgress) -> Mark:
    """Read, encode and write from ``begun`` to the end of the input; on an error the journal is saved."""
    mark = begun
    saved = time.monotonic()
    chunks = encoded_chunks(_chunks(run.inputs, run.layout, begun), run.encoding, run.workers)
    try:
        with closing(chunks):
            for chunk, encoded in chunks:
                mark = _write(writer, chunk, encoded, mark)
                journal.move(mark)
                progress.reach(run.before[chunk.next.file] + chunk.num_packed)
                if time.monotonic() - saved >= run.journal_seconds:
                    _save(writer, journal)
                    saved = time.monotonic()
    except BaseException as error:
        try:
            if mark != begun:
                _save(writer, journal)
        finally:  # on a full disk that fails as well, and what was saved before is kept
            if writer.keep and isinstance(error, DataError | KeyboardInterrupt):
                _tell_kept(error, journal)
        raise
    return mark


def _write(writer: CorpusWriter, chunk: Chunk, encoded: EncodedChunk, mark: Mark) -> Mark:
    tally = deepcopy(mark.tally)
    documents = writer.add(encoded.tokens, encoded.lengths, encoded.ends)
    tally.add(encoded, documents, before=mark.written, num_bytes=chunk.num_bytes)
    return Mark(chunk.next, writer.written, tally, chunk.counts)


def _save(writer: CorpusWriter, journal: Journal) -> None:
    """The data first: the journal must never speak of what is not on the disk."""
    writer.sync()
    journal.save()
    writer.keep = True


def _chunks(inputs: list[Path], layout: TextLayout, begun: Mark) -> Iterator[Chunk]:
    """Pieces of all files in order, in lists of about half a megabyte; the last one may be empty."""
    counts = deepcopy(begun.counts)
    pieces: list[Piece] = []
    place, size, packed = begun.place, 0, 0
    for number in range(begun.place.file, len(inputs)):
        for read in read_file(inputs[number], layout, place, counts):
            if read.piece is not None:
                pieces.append(read.piece)
                size += read.piece.num_bytes or len(read.piece.text)
            place, packed = read.next or place, read.num_packed
            if size >= CHUNK and read.next is not None:
                yield Chunk(pieces, place, replace(counts), packed if place.file == number else 0)
                pieces, size = [], 0
    yield Chunk(pieces, place, replace(counts), 0)


def _check_output(read: list[Path], output: Path) -> None:
    if output.name in ("", "..") or output.is_dir():
        raise DataError(
            f"--output {output} is a folder, not the prefix of files; give one, such as {output / 'corpus'}"
        )
    if output.suffix in {path.suffix for path in corpus_paths(Path("any"))}:
        raise DataError(
            f"--output {output} has the ending of a file, and it is the prefix of three: give it without, as "
            f"{output.with_suffix('')}"
        )
    replaced = {os.path.realpath(path) for path in corpus_paths(output)} & set(map(os.path.realpath, read))
    if replaced:
        raise DataError(f"--output {output} would replace the input {replaced.pop()}; choose another prefix")


def _check_absent(output: Path, overwrite: bool) -> None:
    standing = [str(path) for path in corpus_paths(output) if path.exists()]
    if standing and not overwrite:
        raise DataError(
            f"{', '.join(standing)}: exists already; choose another --output, or replace it with --overwrite"
        )


def _publish(output: Path, journal: Journal, beginning: Beginning) -> PreprocessReport:
    """End a run that was killed while it renamed its files."""
    publish(output)
    facts = CorpusFacts.read(corpus_paths(output)[2])
    discard(output)
    journal.remove()
    return PreprocessReport(facts, beginning.mark.tally, beginning.mark.counts, 0.0, 0)


def _tell(output: Path, beginning: Beginning, inputs: list[Path]) -> None:
    if beginning.refused:
        print(f"{output}: an earlier run was cut off, but {beginning.refused}: begins anew", file=sys.stderr)
    elif beginning.mark != Mark():
        place = beginning.mark.place
        print(
            f"{output}: an earlier run was cut off; goes on after {beginning.mark.tally.num_bytes / 1e6:.1f} MB "
            f"of text, in file {min(place.file + 1, len(inputs))} of {len(inputs)}",
            file=sys.stderr,
        )


def _tell_case(tokenizer: Tokenizer, path: Path) -> None:
    """Say so where a vocabulary looks cased and the text is lowercased."""
    ordinary = (tokenizer.vocabulary.entries[number] for number in tokenizer.vocabulary.ordinary_ids)
    cased = sum(entry != entry.lower() and not entry.startswith("[unused") for entry in ordinary)
    if tokenizer.lowercase and cased:
        print(
            f"note: {path} has {cased:,} entries with upper-case letters, which lowercased text never uses; if it "
            "is the vocabulary of a cased model, give --cased",
            file=sys.stderr,
        )


def _tell_kept(error: BaseException, journal: Journal) -> None:
    why = "interrupted; " if isinstance(error, KeyboardInterrupt) else ""
    print(
        f"{why}what is done is kept in {journal.path}; the same command again goes on from there",
        file=sys.stderr,
    )
