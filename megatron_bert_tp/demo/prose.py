"""English sentences out of docstrings: what is left without code, tables, prompts, lists and markup.

A docstring is cut into blocks at blank lines, list items and changes of indentation.  Blocks that belong to
something else than prose are dropped; the others lose their inline markup and are split into sentences,
each of which still has to look like English.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from megatron_bert_tp.data.preprocessing.sentences import split_sentences

MIN_WORDS, MAX_WORDS = 4, 120

_UNDERLINE = re.compile(r"^\s*([-=~^*#+\"'`_.:])\1{2,}\s*$")
_DROPPED_SECTION = re.compile(
    r"^(other |keyword )?(parameters?|arguments?|args|kwargs|returns?|yields?|raises?|receives|warns|references?|"
    r"examples?|see also|attributes?|methods|members|inputs?|outputs?|shape|usage|literature|bibliography|"
    r"doctests?|index|contents|copyright|licen[cs]e|authors?|type parameters?|footnotes?)\b.{0,12}$",
    re.IGNORECASE,
)
_HEADER = re.compile(r"^\s*(\*\*)?([A-Z]\w*( [a-z]\w*)?|[a-z]+)(\*\*)?\s*::?$")
_DIRECTIVE = re.compile(r"^\s*(\.\.( |$)|:\w[\w *.,|\[\]-]*:(\s|$))")
_ADMONITION = re.compile(
    r"^\s*(\.\. (note|warning|important|tip|hint|caution|attention|admonition)::|"
    r"(\*\*)?(note|notes|warning|important|tip|hint|caution|nb|n\.b\.|background|overview|motivation|description)"
    r"(\*\*)?::?(\*\*)?(?=\s|$))\s*(?P<text>.*)$",
    re.IGNORECASE,
)
_ITEM = re.compile(r"^\s*([-*+•]|\(?(\d{1,2}|[a-zA-Z])[.)]|#\.)\s+(?=\S)")
_PROMPT = re.compile(r"^\s*(>>>|\.\.\. |In \[\d|Out\[\d|\$ )")
_CODE = re.compile(
    r"^\s*(% |#|@\w|\||\+[-=+]+|<\w|\{|import \w|from [\w.]+ import|def \w|class \w+[(:]|return [\w.]+(\(.*)?$|"
    r"for \w+ in .*:$|\w+ ?:?:?= |[\w.]+\(.*\)$|[\w.]+\([^)]*$|[\w.\[\]]+ ?[-+*/]?= ?\S)"
)
_FIELD = re.compile(r"^\s*[`*\w.,\[\]/|\"'<>=-]+( ?\([^)]*\))?( ?, [`*\w.]+)*\s*(:|--|:=|::=)(\s|$)")
_TABLE = re.compile(r"\S {3,}\S|\t.*\t|\S\s+\|\s+\S|={4,}|-{4,}|\+--|[─-╿]")


@dataclass
class _Block:
    """Lines that belong together, without their indentation."""

    indent: int
    lines: list[str]

    @property
    def text(self) -> str:
        return " ".join(self.lines)


def prose_sentences(docstring: str) -> list[str]:
    """Sentences of 4 to 120 words of one cleaned docstring (`ast.get_docstring`), in order."""
    paragraphs = [plain(block.text) for block in _prose_blocks(docstring.expandtabs().splitlines())]
    if paragraphs and _SUMMARY.search(paragraphs[0]):
        paragraphs[0] += "."
    sentences = split_sentences("\n\n".join(paragraphs), sentence_per_line=False)
    return [stripped for sentence in sentences if is_prose(stripped := sentence.strip())]


_SUMMARY = re.compile(r"^(\S+ ){4,}\S*[a-z)]$")
"""A first paragraph of five words or more that only lacks its full stop, as is common in summaries."""


def _prose_blocks(lines: list[str]) -> Iterator[_Block]:
    """Blocks of prose; those of dropped sections, directives and indented code are left out."""
    hidden_above: int | None = None  # blocks indented deeper than this belong to what was dropped
    for block in _without_dropped_sections(_blocks(lines)):
        if hidden_above is not None and block.indent > hidden_above:
            continue
        is_dropped = _opens_dropped(block)
        hidden_above = block.indent if is_dropped or block.lines[-1].endswith("::") else None
        if not is_dropped and not _is_code(block):
            yield block


def _without_dropped_sections(blocks: Iterator[_Block]) -> Iterator[_Block]:
    """Leave out underlined titles, and what follows those of parameters, examples and the like."""
    is_dropped = False
    for block in blocks:
        if len(block.lines) >= 2 and _UNDERLINE.match(block.lines[1]):
            is_dropped = bool(_DROPPED_SECTION.match(block.lines[0]))
            block.lines = block.lines[2:]
        elif _UNDERLINE.match(block.lines[0]):
            continue
        if block.lines and not is_dropped:
            yield block


def _blocks(lines: list[str]) -> Iterator[_Block]:
    """Cut at blank lines, list items, underlined titles, and where the indentation changes."""
    block: _Block | None = None
    for line, following in pairwise([*lines, "", ""]):
        indent = len(line) - len(line.lstrip())
        item = _ITEM.match(line)
        is_title = bool(_UNDERLINE.match(following))
        is_step = block is not None and indent != block.indent and not _UNDERLINE.match(line)
        if block is not None and (item or is_title or is_step or not line.strip()):
            yield block
            block = None
        if not line.strip():
            continue
        if block is None:
            text_indent = item.end() if item else indent
            block = _Block(text_indent, [line[text_indent:].rstrip()])
        else:
            block.lines.append(line.strip())


def _opens_dropped(block: _Block) -> bool:
    """Whether the block and what is indented below it is no prose: a directive, a field, a header."""
    first = block.lines[0]
    if admonition := _ADMONITION.match(first):
        block.lines[0] = admonition["text"]
        return False
    if _DIRECTIVE.match(first) or _FIELD.match(first):
        return True
    return (
        len(block.lines) == 1
        and bool(_HEADER.match(first))
        and bool(_DROPPED_SECTION.match(first.rstrip(":")))
    )


def _is_code(block: _Block) -> bool:
    """Whether there is a prompt or a table in the block, or code in a third of its lines."""
    if any(_PROMPT.match(line) or _TABLE.search(line) for line in block.lines):
        return True
    return 3 * sum(bool(_CODE.match(line)) for line in block.lines) >= len(block.lines)


_MARKUP = [
    (re.compile(r":[\w:+.-]+:`~?(?:[\w.]*\.)?([^`<]*?)(?:\s*<[^`>]*>)?`"), r"\1"),  # roles
    (re.compile(r"`([^`<]+?)\s*<[^`>]+>`__?"), r"\1"),  # links with a target
    (
        re.compile(r"(?<!\bin)(?<!\bby)(?<!\bof)(?<!\bfrom)(?<!\bsee)(?<!\band)(?<!\bto)\s+\[[^\]\s]+\]_"),
        "",
    ),  # notes
    (re.compile(r"(\[[^\]\s]+\])_"), r"\1"),  # citations that the sentence needs
    (re.compile(r"\$([\w-]{1,4})\$"), r"\1"),  # $G$ is read as G
    (re.compile(r"``?([^`]+)``?_{0,2}"), r"\1"),
    (re.compile(r"'([^'`]+)`|`([^'`]+)'"), r"\1\2"),
    (re.compile(r"\*\*([^*]+)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*([^*\s][^*]*)\*(?![\w*])"), r"\1"),
    (re.compile(r"(?<=\w)\(\)"), ""),  # foo() is read as foo
    (re.compile(r"::$"), ":"),
    (re.compile(r"\s+"), " "),
]
# The splitter takes "of G." for an initial: a blank line before a word that opens sentences helps it.
_LETTER_STOP = re.compile(
    r"(?<=\b[A-Za-z]\.) (?=(?:A|An|The|This|That|These|If|It|In|For|We|When|Then|There|Note|By|Each|Returns?|Let|"
    r"Otherwise|Default|Here|Such|So|Thus)\b(?!\.))"
)


def plain(text: str) -> str:
    """The text without inline markup: literals, roles, emphasis, links and citations keep their words."""
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return _LETTER_STOP.sub("\n\n", text.strip())


_OPENING = re.compile(r"^[\"\u201c'(]?[A-Z][\w'\u2019-]*")
_ENDING = re.compile(r"[.!?][\"\u201d')]{0,2}$")
_FOREIGN = re.compile(r"[\\`{}|^$\]\[]{2}|\\|`|[{}|^$]|::|://|\.{4}|-->|->|<-|:=|@\w")
_CLOSING_QUOTES = r"[)\"\u201d'\u2019]*"
_WORD = re.compile(
    r"^[(\"\u201c'\u2018]*[A-Za-z]+([\u2019'-][A-Za-z]+)*"
    + _CLOSING_QUOTES
    + r"[.,;:!?]*"
    + _CLOSING_QUOTES
    + "$"
)
WORD_SHARE = 0.7
"""Least share of plain words; the others are numbers, names with underscores or dots, and formulas."""


def is_prose(sentence: str) -> bool:
    """Whether this reads as an English sentence: capital, full stop, 4 to 120 words, mostly plain words."""
    words = sentence.split()
    if not MIN_WORDS <= len(words) <= MAX_WORDS:
        return False
    if not _OPENING.match(sentence) or not _ENDING.search(sentence) or _FOREIGN.search(sentence):
        return False
    num_plain = sum(1 for word in words if _WORD.match(word))
    num_short = sum(1 for word in words if len(word) == 1 and word not in "aAI")
    return num_plain >= WORD_SHARE * len(words) and num_short <= 0.15 * len(words)
