"""Lines from a file or a pipe through a predictor, JSON lines out as they come."""

import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from megatron_bert_tp.errors import ConfigError, DataError
from megatron_bert_tp.prediction.answers import Record
from megatron_bert_tp.prediction.predictor import Predictor, Question
from megatron_bert_tp.prediction.samples import LONGEST_LINE, LineFormat

_TABLES = (".csv", ".tsv")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MOST_READ = LONGEST_LINE + len(_BYTE_ORDER_MARK) + len(b"\r\n") + 1
"""Bytes of a line after which it is too long, whatever of them is no content."""


def answer_stream(predictor: Predictor, source: BinaryIO, sink: FileIO) -> None:
    """Write one JSON line for every line of ``source``, in order, and let the other ranks go.

    DataError at the end when lines could not be answered; their records say why.
    """
    num_lines, failed = 0, []
    for records in answered_windows(predictor, lines_of(source), size=window_size(predictor, source)):
        _write(records, sink)
        num_lines += len(records)
        failed += [record for record in records if is_failure(record)]
    predictor.finish()
    if failed:
        raise DataError(
            f"{len(failed)} of {num_lines} lines could not be answered, and all others are; the first is line "
            f"{failed[0]['line']}: {failed[0]['error']}"
        )


def answered_windows(predictor: Predictor, lines: Iterable[bytes], *, size: int) -> Iterator[list[Record]]:
    """Records of ``size`` lines at a time, among which rows of like length are computed together.

    A line that cannot be answered becomes ``{"line": n, "error": ...}``, counted from 1.
    """
    numbered = enumerate(lines, start=1)
    while window := list(islice(numbered, size)):
        asked = [_asked(predictor, line) for _, line in window]
        answers = predictor.answers([each for each in asked if isinstance(each, Question)])
        told = [next(answers) if isinstance(each, Question) else each for each in asked]
        yield [
            {"line": number, "error": str(record)} if isinstance(record, DataError) else record
            for (number, _), record in zip(window, told, strict=True)
        ]


def is_failure(record: Record) -> bool:
    """Whether a record is that of a line that could not be answered."""
    return "error" in record


def lines_of(source: BinaryIO) -> Iterator[bytes]:
    """Lines without their ends and without a byte order mark.

    Of one that is too long to be answered only the beginning, more than `LONGEST_LINE` bytes, is kept.
    """
    for number, line in enumerate(iter(lambda: source.readline(_MOST_READ), b"")):
        if len(line) == _MOST_READ:
            _skip_to_line_end(line, source)
        content = line.removesuffix(b"\n").removesuffix(b"\r")
        yield content if number else content.removeprefix(_BYTE_ORDER_MARK)


def window_size(predictor: Predictor, source: BinaryIO) -> int:
    """Lines that are read before the first of them is answered.

    A file is there as a whole; whoever writes to a pipe may wait for the answers of one batch.
    """
    is_file = stat.S_ISREG(os.fstat(source.fileno()).st_mode)
    return predictor.batch_size * (predictor.task.sorted_batches if is_file else 1)


@contextmanager
def opened_source(path: Path | None, form: LineFormat) -> Iterator[BinaryIO]:
    """Context manager of the file to read, or of the standard input; DataError for the file of a table."""
    if path is not None and path.suffix.lower() in _TABLES:
        raise DataError(
            f"{path}: a {path.suffix} file is a table with a header, but each line is a question; give {form}, "
            "one a line, in a file with another ending, such as .txt or .jsonl"
        )
    if path is None:
        if sys.stdin is None:
            raise ConfigError("the standard input is closed; give --input, or lines by a pipe")
        yield sys.stdin.buffer
        return
    with path.open("rb") as source:
        yield source


@contextmanager
def opened_sink(path: Path | None, *, source: BinaryIO) -> Iterator[FileIO]:
    """Context manager of the file to write, or of the standard output; ConfigError when it is the ``source``."""
    if path is None and sys.stdout is None:
        raise ConfigError("the standard output is closed; give --output")
    target = sys.stdout.fileno() if path is None else path
    if _is_file_of(source, target):
        name = "the standard output" if path is None else path
        raise ConfigError(f"{name}: is the input, which would be lost; give another --output")
    # Unbuffered: nothing is left to be written at the end, when nobody may be there to read it.
    with open(target, "wb", buffering=0, closefd=path is not None) as sink:
        yield sink


def _is_file_of(source: BinaryIO, target: int | Path) -> bool:
    """Whether both are one file, by whatever names and links; a terminal may well be both."""
    try:
        written = os.stat(target)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(written.st_mode) and os.path.samestat(os.fstat(source.fileno()), written)


def _skip_to_line_end(line: bytes, source: BinaryIO) -> None:
    while line and not line.endswith(b"\n"):
        line = source.readline(_MOST_READ)


def _asked(predictor: Predictor, line: bytes) -> Question | DataError:
    try:
        return predictor.question(line)
    except DataError as error:
        return error


def _write(records: Iterable[Record], sink: FileIO) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    rest = memoryview(text.encode("utf-8"))
    try:
        while rest:
            rest = rest[sink.write(rest) :]
    except BrokenPipeError as error:
        raise DataError("nobody reads the output any more; what was read is whole") from error
