"""Lines of a text file, one by one, with their numbers."""

import codecs
from collections.abc import Generator
from pathlib import Path

from megatron_bert_tp.data.refusals import reading
from megatron_bert_tp.errors import DataError

LONGEST_LINE = 10_000_000
"""Bytes: a longer line is no row of a table but a mistake, and would fill the memory."""


def read_lines(path: Path, encoding: str = "utf-8") -> Generator[tuple[int, str], None, None]:
    """Numbers from 1 and texts of the lines, without their ends (LF or CR LF) and without a byte order mark.

    DataError with file and line for a line that is too long, is not in this encoding, or holds a NUL.
    """
    with reading(path), path.open("rb") as file:
        number = 0
        # One byte more than allowed, and two for the end of the line.
        while content := file.readline(LONGEST_LINE + 3):
            number += 1
            yield number, _text(content, encoding, path, number)


def read_whole(path: Path) -> str:
    """Text of a file that is one JSON value; the same rules, but that a line may be of any length."""
    with reading(path):
        content = path.read_bytes()
    return _decoded(content.removeprefix(codecs.BOM_UTF8), "utf-8", path, 1)


def _text(content: bytes, encoding: str, path: Path, number: int) -> str:
    if number == 1:
        content = content.removeprefix(codecs.BOM_UTF8)
    content = content.removesuffix(b"\n").removesuffix(b"\r")
    if len(content) > LONGEST_LINE:
        raise DataError(
            f"{path}:{number}: the line has more than {LONGEST_LINE} bytes; check that this is the right file, "
            "or cut the text"
        )
    return _decoded(content, encoding, path, number)


def _decoded(content: bytes, encoding: str, path: Path, first_line: int) -> str:
    zero = content.find(b"\0")
    if zero >= 0:
        place = _place(content, zero, path, first_line)
        raise DataError(f"{place} is NUL, which no text has; is the file UTF-16, or compressed? Save it as UTF-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        place = _place(content, error.start, path, first_line)
        raise DataError(f"{place} (0x{content[error.start]:02x}) is not UTF-8; save the file as UTF-8") from error


def _place(content: bytes, offset: int, path: Path, first_line: int) -> str:
    start = content.rfind(b"\n", 0, offset) + 1
    line = first_line + content.count(b"\n", 0, offset)
    return f"{path}:{line}: byte {offset - start} of the line"
