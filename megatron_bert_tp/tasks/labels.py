"""Labels of a task and their numbers.

A label of a table is the text that stands there: in CSV and TSV files ``1`` and ``1.0`` are two texts, and
training data that has both is refused.  A whole number of JSON has no point, so that ``1.0`` reads as ``1`` there.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_bert_tp.config.task_schema import TaskConfig
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks.examples import Example, TextExample, WordsExample
from megatron_bert_tp.tasks.suggestion import suggestion
from megatron_bert_tp.tasks.task import TASKS, Kind

OUTSIDE = "O"
"""Tag of a word that belongs to no entity."""
_NAMED = (Kind.CLASS, Kind.CLASSES, Kind.TAGS)


@dataclass(frozen=True)
class Labels:
    """Names of the classes in the order of their numbers."""

    names: tuple[str, ...]

    def number(self, label: str, place: str) -> int:
        """Number of a label that stands at ``place``; DataError when it is none of the names."""
        number = self._numbers.get(label)
        if number is None:
            value = _value(label)
            same = [name for name in self.names if value is not None and _value(name) == value]
            if same:
                raise DataError(
                    f"{place}: the label {label!r} is the same number as the label {same[0]!r} of the task; write "
                    "it in one way, in all files and in task.labels"
                )
            raise DataError(
                f"{place}: the label {label!r} is none of the labels of the task; "
                f"{suggestion(label, self.names)}; mend the file or set task.labels"
            )
        return number

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}


def labels_of(task: TaskConfig, training: Sequence[Example] | None) -> Labels | None:
    """Those of the settings, else of the task itself, else of its training data; None for a task without names.

    Names of the data are sorted, as numbers where all are whole numbers.  Tags are ``O``, then ``B-x`` and ``I-x``
    of each type x in order, whether the data has both or not.
    """
    known = TASKS[task.name]
    if known.kind not in _NAMED:
        return None
    names = task.labels or known.labels
    if names is None:
        if training is None:
            raise DataError(
                f"the labels of task {task.name!r} are not known; set task.labels to their names in the order of "
                "their numbers"
            )
        names = _sorted_tags(training) if known.kind is Kind.TAGS else _sorted_labels(training)
    return _enough(labels_from_names(names), known.kind)


def labels_from_names(names: Iterable[str]) -> Labels:
    """Labels by name, as settings or the ``id2label`` of a model say; DataError when one is there twice."""
    given = tuple(names)
    twice = sorted(name for name, count in Counter(given).items() if count > 1)
    if twice:
        raise DataError(f"the label {twice[0]!r} is there twice among {list(given)}; name each class once")
    return Labels(given)


def _enough(labels: Labels, kind: Kind) -> Labels:
    least = 1 if kind is Kind.CLASSES else 2
    if len(labels.names) < least:
        raise DataError(
            f"the labels are {list(labels.names)}, but a task needs {least} or more; "
            "give other training data, or set task.labels"
        )
    return labels


def _sorted_labels(examples: Iterable[Example]) -> tuple[str, ...]:
    first_places = _first_places(examples)
    _refuse_two_ways(first_places)
    if all(_is_whole(name) for name in first_places):
        return tuple(sorted(first_places, key=int))
    return tuple(sorted(first_places))


def _sorted_tags(examples: Iterable[Example]) -> tuple[str, ...]:
    types = sorted({tag.partition("-")[2] for tag in _first_places(examples)} - {""})
    return (OUTSIDE, *(f"{begin}-{name}" for name in types for begin in "BI"))


def _first_places(examples: Iterable[Example]) -> dict[str, str]:
    found: dict[str, str] = {}
    for example in examples:
        for label in _labels_in(example):
            found.setdefault(label, example.place)
    return found


def _labels_in(example: Example) -> Iterator[str]:
    if isinstance(example, WordsExample):
        yield from example.tags or ()
    elif isinstance(example, TextExample):
        if isinstance(example.label, str):
            yield example.label
        elif isinstance(example.label, tuple):
            yield from example.label


def _refuse_two_ways(first_places: dict[str, str]) -> None:
    """DataError for labels such as ``1`` and ``1.0``, which are one number: they would be two classes."""
    seen: dict[float, str] = {}
    for name, place in first_places.items():
        number = _value(name)
        if number is None:
            continue
        other = seen.setdefault(number, name)
        if other != name:
            raise DataError(
                f"{place}: the label {name!r} is the same number as {other!r} at {first_places[other]}; "
                "write it in one way, or name both in task.labels"
            )


def _is_whole(name: str) -> bool:
    return name.isascii() and name.removeprefix("-").isdigit()


def _value(name: str) -> float | None:
    digits = name.removeprefix("-").replace(".", "", 1)
    return float(name) if digits.isascii() and digits.isdigit() else None
