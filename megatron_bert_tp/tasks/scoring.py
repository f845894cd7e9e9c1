"""From what a model gives for a part of the data to metrics, predictions, and files for benchmarks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.checkpoint.durable import JSON
from megatron_bert_tp.config.problems import counted
from megatron_bert_tp.config.task_schema import TaskConfig
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks import answers, submissions, tags
from megatron_bert_tp.tasks.answer_scores import metrics_1_1, metrics_2_0
from megatron_bert_tp.tasks.examples import AnswerExample, Example, WordsExample
from megatron_bert_tp.tasks.metrics import Numbers, measured
from megatron_bert_tp.tasks.task import TASKS, Kind

Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.floating]
Metrics = Mapping[str, float]
Record = Mapping[str, JSON]


class Table(answers.Windows, tags.Words, Protocol):
    """What is read of the features of the examples."""

    @property
    def rows_per_sample(self) -> int:
        """1, or the number of choices."""

    @property
    def labels(self) -> Numbers | None:
        """``[samples]`` numbers of classes or choices, or values; ``[samples, classes]`` 1 where one holds."""


@dataclass(frozen=True)
class Scored:
    """Metrics (none unless all examples have labels), a record for each example, and files by their names."""

    metrics: Metrics
    predictions: tuple[Record, ...]
    submissions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Examples with what the model gave for their features."""

    task: TaskConfig
    examples: Sequence[Example]
    table: Table
    outputs: Floats
    names: tuple[str, ...]
    threshold: float

    @property
    def kind(self) -> Kind:
        return TASKS[self.task.name].kind

    def by_example(self, values: Numbers) -> Numbers:
        """``[samples, ...]`` to ``[examples, ...]``, where each example is one sample."""
        assert len(values) == len(self.examples)
        return values[np.argsort(self.table.examples)]

    def expected(self) -> Numbers | None:
        """Labels by example."""
        return None if self.table.labels is None else self.by_example(self.table.labels)

    def measured(self, expected: Numbers | None, predicted: Numbers) -> Metrics:
        """The metrics of the task, of all examples and of each group."""
        if expected is None:
            return {}
        names = TASKS[self.task.name].metrics
        return by_group(
            self.examples, lambda chosen: measured(self.kind, names, expected[chosen], predicted[chosen])
        )


def score(
    task: TaskConfig,
    examples: Sequence[Example],
    table: Table,
    outputs: Floats,
    *,
    labels: tuple[str, ...] | None,
    null_threshold: float = 0.0,
) -> Scored:
    """Metrics, predictions and files for benchmarks from the outputs of all samples of ``table``.

    ``outputs`` are those of all samples in their order: ``[samples, labels]``, for choices
    ``[samples * choices, 1]``, for answers ``[tokens, 2]``, for tags ``[tokens, labels]``.  ``labels`` are the
    names of the classes.  Where questions may have no answer, those have none whose odds, the score of no answer
    less that of the best one, are above ``null_threshold``.  DataError for outputs that are no finite numbers.
    """
    _check_finite(examples, table, outputs)
    part = _Part(
        task=task, examples=examples, table=table, outputs=outputs, names=labels or (), threshold=null_threshold
    )
    return _SCORES[part.kind](part)


def may_be_unanswerable(task: TaskConfig, examples: Sequence[Example]) -> bool:
    """Whether a question may have no answer: as the settings say, else whether one of ``examples`` has none."""
    if task.unanswerable is not None:
        return task.unanswerable
    return any(not example.answers and example.is_labelled for example in cast(Sequence[AnswerExample], examples))


def by_group(examples: Sequence[Example], measure: Callable[[Ints], Metrics]) -> Metrics:
    """Metrics of the places of all examples, and, where there are several groups, ``<metric>_<group>`` of each."""
    found = dict(measure(np.arange(len(examples))))
    groups = np.array([example.group for example in examples])
    names = sorted(set(groups.tolist()))
    for group in names if len(names) > 1 else []:
        found |= {f"{name}_{group}": value for name, value in measure(np.flatnonzero(groups == group)).items()}
    return found


def _class(part: _Part) -> Scored:
    outputs, expected = part.by_example(part.outputs), part.expected()
    best = outputs.argmax(axis=1)
    said = [part.names[number] for number in best]
    shares = _softmax(outputs)
    records = [
        {"label": label, "scores": dict(zip(part.names, row, strict=True))}
        for label, row in zip(said, shares.tolist(), strict=True)
    ]
    labels = None if expected is None else [part.names[int(number)] for number in expected]
    places = _places_in_task(part.task.name, part.names)
    return Scored(
        metrics=part.measured(None if expected is None else places[expected.astype(np.int64)], places[best]),
        predictions=_records(part, records, labels),
        submissions=submissions.classes(part.task.name, part.examples, said),
    )


def _places_in_task(name: str, labels: Sequence[str]) -> Ints:
    """``[labels]``: the number that each label has in the task itself; those that it does not know follow.

    F1 is that of the task's class 1, which settings or a model may call by another number.
    """
    own = TASKS[name].labels or ()
    order = [*own, *(label for label in labels if label not in own)]
    places = {label: place for place, label in enumerate(order)}
    return np.array([places[label] for label in labels], dtype=np.int64)


def _classes(part: _Part) -> Scored:
    outputs, expected = part.by_example(part.outputs), part.expected()
    holds = outputs > 0
    # Not 1 / (1 + exp(-x)), which overflows.
    shares = np.exp(-np.logaddexp(0.0, -outputs.astype(np.float64)))
    records: list[Record] = [
        {"labels": _named(part, row), "scores": dict(zip(part.names, each, strict=True))}
        for row, each in zip(holds, shares.tolist(), strict=True)
    ]
    labels = None if expected is None else [_named(part, row) for row in expected > 0]
    wanted = None if expected is None else (expected > 0).astype(np.int64)
    return Scored(
        metrics=part.measured(wanted, holds.astype(np.int64)),
        predictions=_records(part, records, labels),
        submissions={},
    )


def _number(part: _Part) -> Scored:
    values, expected = part.by_example(part.outputs)[:, 0].astype(np.float64), part.expected()
    return Scored(
        metrics=part.measured(expected, values),
        predictions=_records(
            part, [{"value": value} for value in values.tolist()], None if expected is None else expected.tolist()
        ),
        submissions=submissions.numbers(part.task.name, part.examples, values.tolist()),
    )


def _choice(part: _Part) -> Scored:
    outputs = part.by_example(part.outputs.reshape(-1, part.table.rows_per_sample))
    expected, best = part.expected(), outputs.argmax(axis=1)
    records = [
        {"best": number, "scores": row}
        for number, row in zip(best.tolist(), _softmax(outputs).tolist(), strict=True)
    ]
    return Scored(
        metrics=part.measured(expected, best),
        predictions=_records(part, records, None if expected is None else expected.tolist()),
        submissions=submissions.choices(part.task.name, part.examples, best.tolist()),
    )


def _answer(part: _Part) -> Scored:
    examples, task = cast(Sequence[AnswerExample], part.examples), part.task
    limits = answers.Limits(task.n_best, task.longest_answer, may_be_unanswerable(task, examples))
    found = answers.decoded(examples, part.table, part.outputs, limits)
    expected = [[answer.text for answer in example.answers] for example in examples]
    is_labelled = all(example.is_labelled for example in examples)
    if is_labelled and not limits.may_be_none:
        _check_answered(examples)

    def measure(chosen: Ints) -> Metrics:
        wanted, known = [expected[place] for place in chosen], [found[place] for place in chosen]
        said = [each.said(part.threshold).text for each in known]
        if not limits.may_be_none:
            return metrics_1_1(said, wanted)
        odds = np.array([each.odds for each in known], dtype=np.float64)
        return metrics_2_0(said, wanted, spans=[each.span.text for each in known], odds=odds)

    return Scored(
        metrics=by_group(examples, measure) if is_labelled else {},
        predictions=_records(
            part, [_told(each, part.threshold) for each in found], expected if is_labelled else None
        ),
        submissions=submissions.answers(examples, found, threshold=part.threshold),
    )


def _check_answered(examples: Sequence[AnswerExample]) -> None:
    """DataError for the first question without an answer: SQuAD 1.1 does not say what is right there."""
    for example in examples:
        if not example.answers:
            raise DataError(
                f"{example.place}: the question has no answer, but each is measured as if it had one; set "
                "task.unanswerable=true, or false to pass such questions over"
            )


def _tags(part: _Part) -> Scored:
    examples = cast(Sequence[WordsExample], part.examples)
    found = tags.decoded(examples, part.table, part.outputs, part.names)
    expected = [example.tags for example in examples if example.tags is not None]
    is_labelled = len(expected) == len(examples)
    records: list[Record] = [
        {"words": list(example.words), "tags": list(each)} for example, each in zip(examples, found, strict=True)
    ]

    def measure(chosen: Ints) -> Metrics:
        return tags.entity_metrics([expected[place] for place in chosen], [found[place] for place in chosen])

    return Scored(
        metrics=by_group(examples, measure) if is_labelled else {},
        predictions=_records(part, records, [list(each) for each in expected] if is_labelled else None),
        submissions=submissions.columns(examples, found),
    )


_SCORES: Mapping[Kind, Callable[[_Part], Scored]] = {
    Kind.CLASS: _class,
    Kind.CLASSES: _classes,
    Kind.NUMBER: _number,
    Kind.CHOICE: _choice,
    Kind.ANSWER: _answer,
    Kind.TAGS: _tags,
}


def _records(part: _Part, records: Sequence[Record], expected: Sequence[JSON] | None) -> tuple[Record, ...]:
    """The records with the id of their example, and with its label where it has one."""
    told: Sequence[Record] = [{"expected": each} for each in expected or ()]
    wanted = [{}] * len(records) if expected is None else told
    return tuple(
        {"id": example.id, **record, **label}
        for example, record, label in zip(part.examples, records, wanted, strict=True)
    )


def _named(part: _Part, holds: Numbers) -> list[str]:
    return [name for name, does in zip(part.names, holds.tolist(), strict=True) if does]


def _told(found: answers.Answers, threshold: float) -> Record:
    """An answer as a record; scores are sums of logits."""
    said, null = found.said(threshold), found.null
    record: Record = {"answer": said.text, "start": said.start, "end": said.end, "probability": said.probability}
    scores: Record = {"score": found.span.score}
    return {**record, **scores, **({} if null is None else {"no_answer_score": null.score})}


def _softmax(outputs: Numbers) -> npt.NDArray[np.float64]:
    values = outputs.astype(np.float64)
    weights = np.exp(values - values.max(axis=1, keepdims=True))
    shares: npt.NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return shares


def _check_finite(examples: Sequence[Example], table: Table, outputs: Floats) -> None:
    """DataError that names the first example whose outputs are no finite numbers."""
    items = np.flatnonzero(~np.isfinite(outputs).all(axis=1))
    if not len(items):
        return
    rows = len(table.bounds) - 1
    row = int(items[0]) if len(outputs) == rows else int(np.searchsorted(table.bounds, items[0], side="right")) - 1
    example = examples[int(table.examples[row // table.rows_per_sample])]
    raise DataError(
        f"{example.place}: the model gives no finite number for the example {example.id!r}, and for "
        f"{len(items) - 1} more of {counted(len(outputs), 'output')}; its weights are damaged or diverged in "
        "training: train with a lower optimizer.learning_rate, or evaluate another checkpoint"
    )
