"""Examples as the files of tasks have them, before any tokenizer.

Labels are what the file says, as text; `tasks.labels` makes numbers of them.
"""

from dataclasses import dataclass

UNKNOWN_PLACE = -1
"""Start of an answer whose text is not where its file says, so that it can be measured by, but not learned."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """What all examples have.

    ``id`` is what predictions are called by, unique among the files of a part.  ``place`` says where the example
    stands, as ``dev.tsv:17``.  ``group`` is the part of the files that is also measured alone (matched and
    mismatched, middle and high), or empty.
    """

    id: str
    place: str
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class TextExample(Example):
    """A text or a pair, with a class, several classes, or a number; None where the file has no label."""

    text: str
    pair: str | None = None
    label: str | tuple[str, ...] | float | None = None


@dataclass(frozen=True, kw_only=True)
class ChoiceExample(Example):
    """Several pairs of texts, of which one is right; ``label`` counts from 0."""

    pairs: tuple[tuple[str, str], ...]
    label: int | None = None


@dataclass(frozen=True)
class Answer:
    """An answer and the character of the context at which it begins, or `UNKNOWN_PLACE`."""

    text: str
    start: int


@dataclass(frozen=True, kw_only=True)
class AnswerExample(Example):
    """A question about a context.

    No answers: there is none in the context, or, where not ``is_labelled``, none is known.
    """

    question: str
    context: str
    answers: tuple[Answer, ...] = ()
    is_labelled: bool = True


@dataclass(frozen=True, kw_only=True)
class WordsExample(Example):
    """A sentence as words with a tag each (IOB2, whatever the file has), or without tags.

    ``document`` numbers the document of the sentence within all files.
    """

    words: tuple[str, ...]
    tags: tuple[str, ...] | None = None
    document: int = 0
