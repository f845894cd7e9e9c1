"""Examples of a part (training, validation or test) out of all its files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_bert_tp.config.problems import counted
from megatron_bert_tp.config.task_schema import TaskConfig
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks.examples import ChoiceExample, Example
from megatron_bert_tp.tasks.reading.columns import read_columns
from megatron_bert_tp.tasks.reading.glue import GLUE, read_glue
from megatron_bert_tp.tasks.reading.parts import Note, Part, Source, no_examples, sources_of
from megatron_bert_tp.tasks.reading.race import read_race
from megatron_bert_tp.tasks.reading.squad import read_squad
from megatron_bert_tp.tasks.reading.tables import read_table
from megatron_bert_tp.tasks.reading.trec import read_trec

_OfFile = Callable[[TaskConfig, Source], Iterator[Example | Note]]
_OfFiles = Callable[[TaskConfig, Sequence[Source]], Iterator[Example | Note]]


@dataclass(frozen=True)
class Reading:
    """Examples in the order of the files, and a line each about what was passed over or mended and why."""

    examples: tuple[Example, ...]
    notes: tuple[str, ...]


def read_examples(task: TaskConfig, paths: Sequence[Path], *, part: Part) -> Reading:
    """Examples of all these files; DataError with file and line for what is wrong.

    A missing label is an error in training and validation; in a test part labels are taken where they are there.
    What cannot be learned from, but measured, is passed over in training alone.  Several files are a group each,
    called by the name of the file.  A number of a row or sentence, and an ``index`` of GLUE, then has this name
    and a colon before it, to be unique; any other id that is there twice is an error.
    """
    sources = sources_of(task.name, paths, part=part)
    items = list(_READERS[task.name](task, sources))
    examples = tuple(item for item in items if not isinstance(item, Note))
    _check_ids(examples)
    _check_choices(examples)
    return Reading(examples, tuple(item.text for item in items if isinstance(item, Note)))


def _each(read: _OfFile) -> _OfFiles:
    """Reader of several files, one after the other; DataError when one of them has no example."""

    def read_all(task: TaskConfig, sources: Sequence[Source]) -> Iterator[Example | Note]:
        for source in sources:
            items = list(read(task, source))
            notes = [item for item in items if isinstance(item, Note)]
            if len(notes) == len(items):
                raise no_examples(source.path, notes)
            yield from items

    return read_all


_READERS: Mapping[str, _OfFiles] = {
    **dict.fromkeys(GLUE, _each(read_glue)),
    **dict.fromkeys(("trec", "trec-fine"), _each(read_trec)),
    **dict.fromkeys(("classification", "multi-label", "regression", "multiple-choice"), _each(read_table)),
    "race": _each(read_race),
    "squad": _each(read_squad),
    "token-classification": read_columns,
}


def _check_ids(examples: Sequence[Example]) -> None:
    places: dict[str, str] = {}
    for example in examples:
        other = places.setdefault(example.id, example.place)
        if other is not example.place:
            raise DataError(
                f"{example.place}: the id {example.id!r} is also that of {other}; predictions are called by it: "
                "give each example its own"
            )


def _check_choices(examples: Sequence[Example]) -> None:
    """DataError when one example has other than so many choices: a batch has the same number for all."""
    first: ChoiceExample | None = None
    for example in examples:
        if not isinstance(example, ChoiceExample):
            return
        first = first or example
        if len(example.pairs) != len(first.pairs):
            raise DataError(
                f"{example.place}: has {counted(len(example.pairs), 'choice')}, but {first.place} has "
                f"{len(first.pairs)}; all examples need the same number"
            )
