"""Lines of bytes, bounded in length, and their text under a rule for bytes that are not UTF-8."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import BinaryIO

from megatron_bert_tp.errors import DataError

LONGEST_LINE = 1 << 23
"""Bytes of plain text after which a line is cut in two, so that memory stays bounded."""
_BOM = "\ufeff"
_LINE_ENDS = re.compile(r"\r\n?")
_BOMS = re.compile(rf"^{_BOM}+", flags=re.MULTILINE)


class InvalidText(Enum):
    """What becomes of bytes that are not UTF-8, and of halves of surrogate pairs in JSON."""

    REFUSE = "error"
    REPLACE = "replace"
    DROP_LINE = "drop-line"


@dataclass
class Decoder:
    """Bytes to text; counts the lines that were mended or dropped."""

    place: str
    """File, for messages."""
    rule: InvalidText
    unit: str = "line"
    """What is counted: lines of text, or rows."""
    hint: str | None = None
    """What the file seems to be, if not text."""
    replaced: int = field(default=0, init=False)
    dropped: int = field(default=0, init=False)

    def text(self, content: bytes, first_line: int) -> str:
        """Text of whole lines, of which the first has this number; line ends become line feeds."""
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            text = self._mend(content, first_line, error)
        return clean(text)

    def mend_surrogates(self, text: str, line: int) -> str:
        """Text of a JSON string without halves of surrogate pairs, which are no characters."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            if self.rule is InvalidText.REFUSE:
                raise DataError(
                    f"{self.place}, {self.unit} {line}: the escape \\u{ord(text[error.start]):04x} is half of a "
                    f"surrogate pair and no character; {_WAY_OUT}"
                ) from error
            if self.rule is InvalidText.DROP_LINE:
                self.dropped += 1
                return ""
            self.replaced += 1
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text

    def _mend(self, content: bytes, first_line: int, error: UnicodeDecodeError) -> str:
        if self.rule is InvalidText.REFUSE:
            raise self._refusal(content, first_line, error.start) from error
        return "".join(self._mended(line) for line in content.splitlines(keepends=True))

    def _mended(self, line: bytes) -> str:
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError:
            if self.rule is InvalidText.DROP_LINE:
                self.dropped += 1
                return ""
            self.replaced += 1
            return line.decode("utf-8", "replace")

    def _refusal(self, content: bytes, first_line: int, position: int) -> DataError:
        before = (content[:position] + b"x").splitlines()
        number = first_line if self.unit == "row" else first_line + len(before) - 1
        place = f"{self.place}, {self.unit} {number}"
        told = f"{place}: byte {len(before[-1])} (0x{content[position]:02x}) is not UTF-8; "
        return DataError(told + (f"the file is {self.hint}" if self.hint else _WAY_OUT))


_WAY_OUT = "save the file as UTF-8, or give --invalid-utf8 replace or --invalid-utf8 drop-line"


def clean(text: str) -> str:
    """Text with line feeds for all line ends and without byte order marks before lines."""
    if "\r" in text:
        text = _LINE_ENDS.sub("\n", text)
    return _BOMS.sub("", text) if _BOM in text else text


def is_blank(line: bytes) -> bool:
    """Whether a line holds nothing but white space of any script and byte order marks."""
    if not line.strip():
        return True
    if line[0] < 128 and not line[:1].isspace():
        return False
    return not line.decode("utf-8", "replace").replace(_BOM, "").strip()


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends, which are LF, CR or CR LF; one over ``LONGEST_LINE`` comes in several parts."""
    carried = b""
    while part := carried + file.readline(LONGEST_LINE - len(carried)):
        carried = b""
        if not part.endswith(b"\n") and len(part) >= LONGEST_LINE:
            cut = _cut(part)
            part, carried = part[:cut], part[cut:]
        if b"\r" in part:
            yield from part.splitlines(keepends=True)
        else:
            yield part


def _cut(part: bytes) -> int:
    """Where to cut a line that is too long: after the last line end or space, else before a character."""
    for mark in (b"\r", b" "):
        place = part.rfind(mark, len(part) // 2, len(part) - 1) + 1
        if place:
            return place + part.startswith(b"\n", place)  # not between CR and LF
    end = len(part) - 1
    while end > len(part) - 4 and part[end] & 0xC0 == 0x80:
        end -= 1
    return end
