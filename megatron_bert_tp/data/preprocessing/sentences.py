"""Sentences out of the text of a document, in time that grows with its length alone."""

import re
from collections.abc import Callable, Iterator

import sentencex

_BLANK_LINES = re.compile(r"\n\s*\n")
_WINDOW = 1 << 14  # characters
_WIDEST_WRAPPED = 200  # characters; editors and mail wrap lines far below


def split_sentences(text: str, *, sentence_per_line: bool, language: str = "en") -> list[str]:
    """Sentences of one document, without empty ones; paragraphs always end a sentence."""
    if sentence_per_line:
        return [line for line in text.split("\n") if line and not line.isspace()]
    paragraphs = (" ".join(paragraph.split()) for paragraph in _paragraphs(text))
    return [sentence for paragraph in paragraphs if paragraph for sentence in segment(language, paragraph)]


def _paragraphs(text: str) -> Iterator[str]:
    """Parts of a text between blank lines, or between any two lines where they are too long to be wrapped.

    Short paragraphs are worth having: a quotation mark that is never closed misleads the splitter up to the end.
    """
    for block in _BLANK_LINES.split(text):
        lines = block.split("\n")
        if len(lines) > 1 and max(map(len, lines)) > _WIDEST_WRAPPED:
            yield from lines
        else:
            yield block


def segment(language: str, text: str) -> list[str]:
    """Sentences of one paragraph, which together are the text.

    The library's time can grow with the square of the length (100 kB of opening quotes take it seconds), so
    that a long text goes to it in windows.  Each begins where the last sentence of the one before began.
    """
    return _windowed(text, lambda window: sentencex.segment(language, window), _WINDOW)


def _windowed(text: str, split: Callable[[str], list[str]], size: int) -> list[str]:
    sentences: list[str] = []
    begun = ""  # of a sentence that is longer than a window
    start = 0
    while len(text) - start > size:
        window = text[start : start + size]
        found = split(window)
        if len(found) > 1:
            last = len(found.pop())
            sentences += [begun + found[0], *found[1:]]
            begun = ""
            start += size - last
        else:
            length = window.rfind(" ") + 1 or size
            begun += window[:length]
            start += length
    rest = split(text[start:])
    return [*sentences, begun + rest[0], *rest[1:]] if rest else [*sentences, begun]
