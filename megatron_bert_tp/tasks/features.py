"""Examples to the table that batches are made of, by the kind of the task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import cast

import numpy as np
import numpy.typing as npt
import tokenizers

from megatron_bert_tp.config.task_schema import TaskConfig
from megatron_bert_tp.data.draws import Ints
from megatron_bert_tp.tasks.answer_features import answer_features
from megatron_bert_tp.tasks.examples import AnswerExample, ChoiceExample, Example, TextExample, WordsExample
from megatron_bert_tp.tasks.feature_table import FeatureTable, Flags, Targets, Tokens, bounds_of
from megatron_bert_tp.tasks.labels import Labels
from megatron_bert_tp.tasks.tag_features import tag_features
from megatron_bert_tp.tasks.task import TASKS, Kind
from megatron_bert_tp.text.encoder import Text, TextEncoder, longest_first

__all__ = ["FeatureTable", "features_of"]

_TEXTS_AT_ONCE = 4096


def features_of(
    examples: Sequence[Example],
    encoder: TextEncoder,
    task: TaskConfig,
    *,
    labels: Labels | None,
    sequence_length: int,
) -> FeatureTable:
    """The samples of ``examples``, in their order, with rows of at most ``sequence_length`` tokens.

    Where the tokenizer itself allows fewer, rows have fewer.  ``labels`` are the classes of the task, None where
    it has none.  DataError for a label that is none of them, for a question that leaves no room for a context,
    and for pairs where the model has one token type.
    """
    kind = TASKS[task.name].kind
    inputs = _Inputs(encoder, task, labels, min(sequence_length, encoder.longest))
    return _FEATURES[kind](kind, examples, inputs)


@dataclass(frozen=True)
class _Inputs:
    encoder: TextEncoder
    task: TaskConfig
    labels: Labels | None
    longest: int


@dataclass(frozen=True)
class _Rows:
    """``ids`` and ``types`` ``[tokens]``, ``lengths`` and ``is_cut`` ``[rows]``."""

    ids: Tokens
    types: npt.NDArray[np.uint8]
    lengths: Ints
    is_cut: Flags


def _text_features(kind: Kind, examples: Sequence[Example], inputs: _Inputs) -> FeatureTable:
    given = cast(Sequence[TextExample], examples)
    texts: list[Text] = [each.text if each.pair is None else (each.text, each.pair) for each in given]
    rows = _rows(texts, inputs)
    return FeatureTable(
        kind=kind,
        ids=rows.ids,
        types=rows.types,
        bounds=bounds_of(rows.lengths),
        examples=np.arange(len(given)),
        labels=_targets(kind, given, inputs.labels),
        truncated=int(rows.is_cut.sum()),
    )


def _choice_features(kind: Kind, examples: Sequence[Example], inputs: _Inputs) -> FeatureTable:
    given = cast(Sequence[ChoiceExample], examples)
    num_choices = len(given[0].pairs) if given else 1
    assert all(len(each.pairs) == num_choices for each in given), "reading has seen to it"
    rows = _rows(list(chain.from_iterable(each.pairs for each in given)), inputs)
    chosen = [each.label for each in given if each.label is not None]
    return FeatureTable(
        kind=kind,
        ids=rows.ids,
        types=rows.types,
        bounds=bounds_of(rows.lengths),
        examples=np.arange(len(given)),
        rows_per_sample=num_choices,
        labels=np.array(chosen, dtype=np.int64) if len(chosen) == len(given) else None,
        truncated=int(rows.is_cut.reshape(len(given), num_choices).any(axis=1).sum()),
    )


def _answer_features(_kind: Kind, examples: Sequence[Example], inputs: _Inputs) -> FeatureTable:
    given = cast(Sequence[AnswerExample], examples)
    return answer_features(given, inputs.encoder, longest=inputs.longest, overlap=inputs.task.overlap)


def _tag_features(_kind: Kind, examples: Sequence[Example], inputs: _Inputs) -> FeatureTable:
    given = cast(Sequence[WordsExample], examples)
    return tag_features(given, inputs.encoder, labels=inputs.labels, longest=inputs.longest, unit=inputs.task.unit)


def _rows(texts: Sequence[Text], inputs: _Inputs) -> _Rows:
    """A row for each text or pair; what is too long loses tokens as in `TextEncoder.row`."""
    firsts = range(0, max(len(texts), 1), _TEXTS_AT_ONCE)
    parts = [_some_rows(texts[first : first + _TEXTS_AT_ONCE], inputs) for first in firsts]
    return _Rows(
        ids=np.concatenate([part.ids for part in parts]),
        types=np.concatenate([part.types for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        is_cut=np.concatenate([part.is_cut for part in parts]),
    )


def _some_rows(texts: Sequence[Text], inputs: _Inputs) -> _Rows:
    encodings = inputs.encoder.encoded(texts)
    whole = np.array([len(each) for each in encodings], dtype=np.int64)
    rows = [_cut(each, inputs.longest) for each in encodings]
    return _Rows(
        ids=np.fromiter(chain.from_iterable(ids for ids, _ in rows), np.int32),
        types=np.fromiter(chain.from_iterable(types for _, types in rows), np.uint8),
        lengths=np.minimum(whole, inputs.longest),
        is_cut=whole > inputs.longest,
    )


def _cut(encoding: tokenizers.Encoding, longest: int) -> tuple[list[int], list[int]]:
    """Ids and types of at most ``longest`` tokens.

    The library would also make rows of all that is cut off: each part of one text with each part of the other.
    """
    if len(encoding) <= longest:
        return encoding.ids, encoding.type_ids
    # As floats, since a token that is from neither text has None, which becomes nan.
    segments = np.array(encoding.sequence_ids, dtype=np.float64)
    places = [np.flatnonzero(segments == text) for text in (0, 1)]
    room = longest - int(np.isnan(segments).sum())
    first, second = longest_first(len(places[0]), len(places[1]), room=room)
    stays = np.isnan(segments)
    stays[places[0][:first]] = stays[places[1][:second]] = True
    kept = np.flatnonzero(stays).tolist()
    ids, types = encoding.ids, encoding.type_ids
    return [ids[place] for place in kept], [types[place] for place in kept]


def _targets(kind: Kind, examples: Sequence[TextExample], labels: Labels | None) -> Targets | None:
    if any(each.label is None for each in examples):
        return None
    if kind is Kind.NUMBER:
        return np.array([each.label for each in examples], dtype=np.float64)
    assert labels is not None, "classes have names"
    if kind is Kind.CLASS:
        return np.array([labels.number(str(each.label), each.place) for each in examples], dtype=np.int64)
    holds = np.zeros((len(examples), len(labels.names)), dtype=np.float32)
    for row, each in zip(holds, examples, strict=True):
        assert isinstance(each.label, tuple), "reading has seen to it"
        row[[labels.number(name, each.place) for name in each.label]] = 1
    return holds


_FEATURES: dict[Kind, Callable[[Kind, Sequence[Example], _Inputs], FeatureTable]] = {
    Kind.CLASS: _text_features,
    Kind.CLASSES: _text_features,
    Kind.NUMBER: _text_features,
    Kind.CHOICE: _choice_features,
    Kind.ANSWER: _answer_features,
    Kind.TAGS: _tag_features,
}
