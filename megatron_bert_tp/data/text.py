"""Documents out of text files and JSON lines, and sentences out of documents."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencex

from megatron_bert_tp.data.refusals import reading
from megatron_bert_tp.errors import DataError

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True, kw_only=True)
class TextLayout:
    """How the text of the input files is laid out."""

    field: str = "text"
    """Key of the text in each JSON line; files named .json, .jsonl and .ndjson are JSON lines."""
    document_per_file: bool = False
    """A plain text file is one document; otherwise blank lines separate documents."""
    sentence_per_line: bool = False
    """Each line is a sentence already; otherwise sentences are found by `sentencex`."""


@dataclass(frozen=True)
class Document:
    """The text of one document, and the bytes of its file that reading it has used up."""

    text: str
    num_bytes: int


def check_inputs(paths: list[Path]) -> int:
    """Bytes of all input files; DataError that names every one that is missing, empty or cannot be read."""
    problems = [f"{path}: {problem}" for path in paths if (problem := _problem(path))]
    if problems:
        raise DataError("\n".join([*problems, "Give text files (.txt) or JSON lines (.jsonl) that hold text"]))
    return sum(path.stat().st_size for path in paths)


def read_documents(path: Path, layout: TextLayout) -> Iterator[Document]:
    """Documents of one file in order; DataError with file and line when it cannot be read or has none."""
    documents = _json_documents if path.suffix in JSON_SUFFIXES else _text_documents
    empty = True
    for document in documents(path, layout):
        empty = False
        yield document
    if empty:
        raise DataError(f"{path}: holds no text; leave it out or give a file with text")


def split_sentences(text: str, *, sentence_per_line: bool) -> list[str]:
    """Sentences of one document, without empty ones; blank lines always end a sentence."""
    if sentence_per_line:
        return [line for line in text.split("\n") if not line.isspace() and line]
    paragraphs = (" ".join(paragraph.split()) for paragraph in _BLANK_LINES.split(text))
    return [sentence for paragraph in paragraphs for sentence in sentencex.segment("en", paragraph)]


def _problem(path: Path) -> str | None:
    try:
        if path.is_dir():
            return "is a directory"
        if not path.is_file():
            return "no such file"
        with path.open("rb") as file:
            return None if file.read(1) else "is empty"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _lines(path: Path) -> Iterator[tuple[int, str, int]]:
    """Line number from 1, text without its line end, and bytes."""
    with reading(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: byte {error.start} (0x{line[error.start]:02x}) is not UTF-8; "
                    "save the file as UTF-8"
                ) from error
            yield number, text.rstrip("\r\n"), len(line)


def _text_documents(path: Path, layout: TextLayout) -> Iterator[Document]:
    lines: list[str] = []
    num_bytes = 0
    has_text = False
    for _, line, size in _lines(path):
        num_bytes += size
        blank = not line or line.isspace()
        if blank and has_text and not layout.document_per_file:
            yield Document("\n".join(lines), num_bytes)
            lines, num_bytes, has_text = [], 0, False
            continue
        lines.append(line)
        has_text = has_text or not blank
    if has_text:
        yield Document("\n".join(lines), num_bytes)


def _json_documents(path: Path, layout: TextLayout) -> Iterator[Document]:
    for number, line, size in _lines(path):
        if not line or line.isspace():
            continue
        text = _json_text(line, layout.field, f"{path}, line {number}")
        if text and not text.isspace():
            yield Document(text, size)


def _json_text(line: str, field: str, place: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{place}: not JSON ({error}); each line must be one object with a field {field!r}"
        ) from error
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = f"the fields {sorted(record)[:10]}" if isinstance(record, dict) else f"a {type(record).__name__}"
        raise DataError(
            f"{place}: must be an object whose field {field!r} is a string, but it has {found}; "
            "name the field with --field"
        )
    return text
