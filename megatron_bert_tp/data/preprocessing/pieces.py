"""What reading hands on: documents, the long ones in pieces, and the place where reading can go on."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_bert_tp.data.preprocessing.lines import is_blank, read_lines

PIECE = 1 << 20
"""Bytes of a document after which it may be handed on in pieces."""
_ENDS = ".!?\")\u2026\u3002\uff01\uff1f\u0964\u061f\u06d4\u201d\u2019\xbb\u300d\u300f"
_MARKS = tuple(mark.encode() for mark in _ENDS)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in the input files the next document, or the next piece of one, begins."""

    file: int = 0
    """Which of the files, from 0."""
    offset: int = 0
    """Unpacked bytes before it; for Parquet, rows."""
    line: int = 0
    """Lines before it."""
    inside: bool = False
    """Whether the place is inside a document."""


@dataclass(frozen=True)
class Piece:
    """Text of a document, or of a part of one that ends between two sentences."""

    text: str
    ends_document: bool
    num_bytes: int
    """Unpacked bytes that reading it has used up."""
    next: Place | None
    """Where the text after it begins; None where reading cannot begin there."""


@dataclass(frozen=True)
class Part:
    """Lines of one document, still as bytes."""

    lines: list[bytes]
    num_bytes: int
    """With the blank lines before it."""
    num_lines: int
    """Line ends, with those of the blank lines before it."""
    num_blank: int
    """Blank lines before it."""
    ends_document: bool


def text_parts(
    lines: Iterable[bytes], *, inside: bool, blank_ends: bool, sentence_per_line: bool
) -> Iterator[Part]:
    """Documents out of lines; one longer than ``PIECE`` is cut after blank lines, or else where sentences end.

    ``inside``: the first line goes on with a document.  ``blank_ends``: blank lines end documents.
    """
    part: list[bytes] = []
    size = num_lines = num_blank = 0
    has_text = False
    for line in lines:
        size += len(line)
        num_lines += line.endswith((b"\n", b"\r"))
        blank = is_blank(line)
        if has_text or not blank:
            part.append(line)
        else:
            num_blank = num_lines
        has_text = has_text or not blank
        if blank and blank_ends and (has_text or inside):
            yield Part(part, size, num_lines, num_blank, True)
            part, size, num_lines, num_blank, has_text, inside = [], 0, 0, 0, False, False
        elif has_text and size >= PIECE and (sentence_per_line or _may_cut(line, size, blank)):
            yield Part(part, size, num_lines, num_blank, False)
            part, size, num_lines, num_blank, has_text, inside = [], 0, 0, 0, False, True
    if has_text or inside:
        yield Part(part, size, num_lines, num_blank, True)


def text_pieces(text: str, sentence_per_line: bool, *, num_bytes: int, next_place: Place) -> Iterator[Piece]:
    """One document that is in memory already, cut like one that is not."""
    if len(text) < PIECE:
        yield Piece(text, True, num_bytes, next_place)
        return
    lines = read_lines(io.BytesIO(text.encode()))
    parts = text_parts(lines, inside=False, blank_ends=False, sentence_per_line=sentence_per_line)
    for part in parts:
        yield Piece(b"".join(part.lines).decode(), False, 0, None)
    yield Piece("", True, num_bytes, next_place)


def _may_cut(line: bytes, size: int, blank: bool) -> bool:
    if blank or size >= 4 * PIECE:
        return True
    return size >= 2 * PIECE and line.rstrip().endswith(_MARKS)
