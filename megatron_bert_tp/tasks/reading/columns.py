"""Sentences in columns, as CoNLL has them: a word a line, its tag last, a blank line after each sentence."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_bert_tp.config.problems import counted
from megatron_bert_tp.config.task_schema import TaskConfig
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks.examples import Example, WordsExample
from megatron_bert_tp.tasks.reading.parts import Note, Source
from megatron_bert_tp.tasks.reading.schemes import OUTSIDE, PREFIXES, Scheme, scheme_of, to_iob2
from megatron_bert_tp.tasks.reading.sentences import Sentence, sentences_of


@dataclass
class _Tally:
    num_repaired: int = 0


def read_columns(task: TaskConfig, sources: Sequence[Source]) -> Iterator[Example | Note]:
    """An example for each sentence, called by its number in the file, from 0; tags become IOB2.

    A line is cut at tabs where it has one, else at spaces; the word comes first, the tag last.  ``-DOCSTART-``
    begins a document; a file without it is one document.  The scheme is judged by the tags of all files where
    `task.scheme` is ``auto``.
    """
    sentences = [sentences_of(source) for source in sources]
    scheme = task.scheme
    if scheme == "auto":
        scheme = scheme_of(sentence.tags or () for each in sentences for sentence in each)
    paths = ", ".join(str(source.path) for source in sources)
    if scheme != task.scheme and scheme != "iob2":
        yield Note(f"{paths}: the tags are {scheme.upper()}, judged by all of them, and read as IOB2")
    tally, first_document = _Tally(), 0
    for each in sentences:
        yield from _examples(each, scheme, first_document, tally)
        first_document += each[-1].document + 1
    if tally.num_repaired:
        yield Note(
            f"{paths}: {counted(tally.num_repaired, 'tag is', 'tags are')} not where {scheme.upper()} allows it; "
            "read as the CoNLL evaluation does"
        )


def _examples(
    sentences: Iterable[Sentence], scheme: Scheme, first_document: int, tally_: _Tally
) -> Iterator[WordsExample]:
    for number, sentence in enumerate(sentences):
        _check_prefixes(sentence, scheme)
        tags = None
        if sentence.tags is not None:
            converted = to_iob2(sentence.tags, scheme)
            tally_.num_repaired += converted.num_repaired
            tags = converted.tags
        yield WordsExample(
            id=f"{sentence.source.id_prefix}{number}",
            place=sentence.words[0].place,
            group=sentence.source.group,
            words=tuple(word.text for word in sentence.words),
            tags=tags,
            document=first_document + sentence.document,
        )


def _check_prefixes(sentence: Sentence, scheme: Scheme) -> None:
    for word in sentence.words:
        if word.tag not in (None, OUTSIDE) and word.tag[0] not in PREFIXES[scheme]:
            raise DataError(
                f"{word.place}: the tag {word.tag!r} is none of the scheme {scheme!r}; "
                "set task.scheme to 'bioes' or 'auto'"
            )
