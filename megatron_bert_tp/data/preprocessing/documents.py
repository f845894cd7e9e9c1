"""Documents out of text files, JSON lines and Parquet, each as it is or compressed."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from megatron_bert_tp.data.preprocessing.compressed import Stream, inner_suffix, open_stream, recognised
from megatron_bert_tp.data.preprocessing.lines import Decoder, InvalidText, clean, read_lines
from megatron_bert_tp.data.preprocessing.parquet import read_rows
from megatron_bert_tp.data.preprocessing.pieces import Piece, Place, text_parts, text_pieces
from megatron_bert_tp.errors import DataError

_BLOCK = 1 << 20
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_SUFFIXES = ".json, .jsonl, .ndjson: JSON lines; .parquet; any other: text; text and JSON also .gz, .xz, .zst"


@dataclass(frozen=True, kw_only=True)
class TextLayout:
    """How the text of the input files is laid out."""

    field: str = "text"
    """Key of the text in each JSON line, or column of a Parquet file."""
    document_per_file: bool = False
    """A plain text file is one document; otherwise blank lines separate documents."""
    sentence_per_line: bool = False
    """Each line is a sentence already; otherwise sentences are found by `sentencex`."""
    invalid_text: InvalidText = InvalidText.REFUSE
    """What becomes of bytes that are not UTF-8."""


@dataclass
class InputCounts:
    """What reading has met beside text."""

    empty_files: int = 0
    """Files without text."""
    empty_records: int = 0
    """JSON lines and Parquet rows without text."""
    replaced_lines: int = 0
    """Lines with bytes that are not UTF-8, which were replaced."""
    dropped_lines: int = 0
    """Lines with bytes that are not UTF-8, which were left out."""


@dataclass(frozen=True)
class Read:
    """A piece of a document, or the end of a file (piece None), and how far the file has been read."""

    piece: Piece | None
    next: Place | None
    num_packed: int
    """Bytes of the file that have been read, compressed as it is."""


def check_inputs(paths: list[Path]) -> int:
    """Bytes of all input files; DataError that names every one that is missing or cannot be read."""
    problems = [f"{path}: {problem}" for path in paths if (problem := _problem(path))]
    if problems:
        raise DataError("\n".join([*problems, f"Give files ({_SUFFIXES})"]))
    total = sum(path.stat().st_size for path in paths)
    if not total:
        raise DataError(f"{', '.join(map(str, paths))}: no input file holds a byte; give files with text")
    return total


def read_file(path: Path, layout: TextLayout, start: Place, counts: InputCounts) -> Iterator[Read]:
    """Pieces of one file from ``start`` on, then its end; adds to ``counts`` what it meets.

    DataError with file and line when it cannot be read.
    """
    unit = "row" if inner_suffix(path) == ".parquet" else "line"
    decoder = Decoder(str(path), layout.invalid_text, unit, recognised(path) if unit == "line" else None)
    reader = _READERS.get(inner_suffix(path), _text_file)
    is_empty = start.offset == 0
    for read in reader(path, layout, start, _Reading(decoder, counts)):
        is_empty = False
        _add_mended(decoder, counts)
        yield read
    _add_mended(decoder, counts)
    counts.empty_files += is_empty
    yield Read(None, Place(file=start.file + 1), path.stat().st_size)


@dataclass(frozen=True)
class _Reading:
    decoder: Decoder
    counts: InputCounts


def _add_mended(decoder: Decoder, counts: InputCounts) -> None:
    counts.replaced_lines += decoder.replaced
    counts.dropped_lines += decoder.dropped
    decoder.replaced = decoder.dropped = 0


def _problem(path: Path) -> str | None:
    try:
        if path.is_dir():
            return "is a directory; give the files in it"
        if not path.exists():
            return "no such file"
        if not path.is_file():
            return "is a pipe or a device; save what it gives to a file first"
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _text_file(path: Path, layout: TextLayout, start: Place, reading: _Reading) -> Iterator[Read]:
    with open_stream(path) as stream:
        _skip(stream, start)
        place = start
        parts = text_parts(
            read_lines(stream.unpacked),
            inside=start.inside,
            blank_ends=not layout.document_per_file,
            sentence_per_line=layout.sentence_per_line,
        )
        for part in parts:
            text = reading.decoder.text(b"".join(part.lines), place.line + part.num_blank + 1)
            place = replace(
                place,
                offset=place.offset + part.num_bytes,
                line=place.line + part.num_lines,
                inside=not part.ends_document,
            )
            yield Read(Piece(text, part.ends_document, part.num_bytes, place), place, stream.num_packed)


def _json_file(path: Path, layout: TextLayout, start: Place, reading: _Reading) -> Iterator[Read]:
    with open_stream(path) as stream:
        _skip(stream, start)
        place = start
        for content in _json_lines(stream.unpacked):
            place = replace(place, offset=place.offset + len(content), line=place.line + 1)
            line = reading.decoder.text(content, place.line)
            if not line or line.isspace():
                continue
            text = _json_text(line, layout.field, f"{path}, line {place.line}")
            text = clean(reading.decoder.mend_surrogates(text, place.line))
            if not text or text.isspace():
                reading.counts.empty_records += 1
                continue
            for piece in text_pieces(text, layout.sentence_per_line, num_bytes=len(content), next_place=place):
                yield Read(piece, piece.next, stream.num_packed)


def _parquet_file(path: Path, layout: TextLayout, start: Place, reading: _Reading) -> Iterator[Read]:
    size = path.stat().st_size
    for row, num_rows, content in read_rows(path, layout.field, start.offset):
        place = replace(start, offset=row + 1)
        text = reading.decoder.text(content or b"", row + 1)
        size_of = len(content or b"")
        if not text or text.isspace():
            reading.counts.empty_records += 1
            continue
        for piece in text_pieces(text, layout.sentence_per_line, num_bytes=size_of, next_place=place):
            yield Read(piece, piece.next, size * (row + 1) // num_rows)


_READERS: dict[str, Callable[[Path, TextLayout, Place, _Reading], Iterator[Read]]] = {
    **dict.fromkeys(JSON_SUFFIXES, _json_file),
    ".parquet": _parquet_file,
}


def _json_lines(file: BinaryIO) -> Iterator[bytes]:
    for line in file:
        yield from line.splitlines(keepends=True) if b"\r" in line else (line,)


def _skip(stream: Stream, start: Place) -> None:
    if stream.unpacked is stream.packed:
        stream.packed.seek(start.offset)
        return
    left = start.offset
    while left and (block := stream.unpacked.read(min(left, _BLOCK))):
        left -= len(block)


def _json_text(line: str, field: str, place: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place}: not JSON ({error}); each line must be one object with a field {field!r}"
        ) from error
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(
            f"{place}: must be an object whose field {field!r} is a string, but {_found(record, field)}; "
            "name the field with --field"
        )
    return text


def _found(record: object, field: str) -> str:
    if not isinstance(record, dict):
        return f"it is a {type(record).__name__}"
    if field in record:
        return f"it is {json.dumps(record[field])[:40]} there"
    return f"it has the fields {sorted(record)[:10]}"
