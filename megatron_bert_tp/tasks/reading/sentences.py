"""Sentences as their files have them: words and tags in columns, or rows of a folder of the `datasets` library."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_bert_tp.config.problems import counted
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks.reading.datasets_folder import folder_rows
from megatron_bert_tp.tasks.reading.json_values import shown
from megatron_bert_tp.tasks.reading.lines import read_lines
from megatron_bert_tp.tasks.reading.parts import Source, no_examples
from megatron_bert_tp.tasks.reading.row import Row, Wanted
from megatron_bert_tp.tasks.reading.schemes import is_tag

_DOCUMENT = "-DOCSTART-"
_BLANKS = " \t"  # not those of other scripts: they may be part of a word
_GAP = re.compile(r" +")
_WORDS, _TAGS = "tokens", ("ner_tags", "tags")


@dataclass(frozen=True, slots=True)
class Word:
    """A word and the tag that the file has for it, None where it has none."""

    place: str
    text: str
    tag: str | None


@dataclass(frozen=True)
class Sentence:
    """Words of a sentence; ``document`` is its number within the file, from 0."""

    source: Source
    document: int
    words: tuple[Word, ...]

    @property
    def tags(self) -> tuple[str, ...] | None:
        """As the file has them; None where it has none."""
        tags = tuple(word.tag for word in self.words if word.tag is not None)
        return tags if len(tags) == len(self.words) else None


def sentences_of(source: Source) -> tuple[Sentence, ...]:
    """All sentences of a file or folder; DataError with file and line for what is wrong, or when there is none."""
    found = tuple(_of_folder(source) if source.path.is_dir() else _of_file(source))
    if not found:
        raise no_examples(source.path, ())
    return found


def _of_file(source: Source) -> Iterator[Sentence]:
    """Where labels are not needed, there are tags if most of the last columns are: the others are damage."""
    groups = list(_groups(source))
    are_tags = [len(fields) > 1 and is_tag(fields[-1]) for _, lines in groups for _, fields in lines]
    has_tags = source.is_labelled or 2 * sum(are_tags) > len(are_tags)
    for document, lines in groups:
        words = (_word(f"{source.path}:{line}", fields, has_tag=has_tags) for line, fields in lines)
        yield Sentence(source, document, tuple(words))


def _groups(source: Source) -> Iterator[tuple[int, list[tuple[int, list[str]]]]]:
    """Number of the document, and the numbers and columns of the lines, of each sentence of a file."""
    document = 0
    lines: list[tuple[int, list[str]]] = []
    for number, line in read_lines(source.path):
        fields = _fields(line)
        begins_document = bool(fields) and fields[0] == _DOCUMENT
        if fields and not begins_document:
            lines.append((number, fields))
            continue
        if lines:
            yield document, lines
            lines = []
        document += begins_document
    if lines:
        yield document, lines


def _fields(line: str) -> list[str]:
    if not line.strip(_BLANKS):
        return []
    if "\t" in line:
        return [field.strip(" ") for field in line.split("\t")]
    return _GAP.split(line.strip(" "))


def _of_folder(source: Source) -> Iterator[Sentence]:
    """Rows as `conll2003` on Hugging Face's hub has them: lists of ``tokens`` and ``ner_tags``, or ``tags``."""
    for row in folder_rows(source.path, Wanted(needed=(_WORDS,), optional=_TAGS)):
        words, tags = _list(row, _WORDS), None
        column = next((name for name in _TAGS if _has_tags(row.values.get(name), source)), None)
        if column is not None:
            tags = _list(row, column)
        elif source.is_labelled:
            raise DataError(f"{row.place}: there are no tags; the column must be {' or '.join(map(repr, _TAGS))}")
        if tags is not None and len(tags) != len(words):
            raise DataError(
                f"{row.place}: has {counted(len(tags), 'tag')} for {counted(len(words), 'word')}; save the folder "
                "anew"
            )
        columns = [words] if tags is None else [words, tags]
        if words:
            fields = zip(*columns, strict=True)
            yield Sentence(source, 0, tuple(_word(row.place, each, has_tag=tags is not None) for each in fields))


def _has_tags(values: object, source: Source) -> bool:
    """Whether there are tags; in a test part they may be hidden, each of them."""
    is_hidden = isinstance(values, list) and bool(values) and all(value is None for value in values)
    return values is not None and (source.is_labelled or not is_hidden)


def _list(row: Row, column: str) -> list[str]:
    values = row.values[column]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise DataError(f"{row.place}: {column!r} must be a list of texts or classes, not {shown(values)}")
    return values


def _word(place: str, fields: Sequence[str], *, has_tag: bool) -> Word:
    if not fields[0]:
        raise DataError(f"{place}: the first column is empty, but it must be the word; mend the file")
    if not has_tag:
        return Word(place, fields[0], None)
    if len(fields) < 2:
        raise DataError(f"{place}: the word {fields[0]!r} has no tag; give it in a second column, parted by a tab")
    if not is_tag(fields[-1]):
        raise DataError(
            f"{place}: the tag {shown(fields[-1])} is neither 'O' nor a prefix such as 'B-' and a type; "
            "the tag must be the last column"
        )
    return Word(place, fields[0], fields[-1])
