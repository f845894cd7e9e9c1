"""Questions and contexts as windows: the whole question, and a part of the context that overlaps the next one.

The windows and labels are those of `transformers`' example `run_qa.py`, but for two things.  An answer that begins
with the last token of a window has that token as its start, where the example's loop runs on to [SEP].  And an
overlap for which a long question leaves no room shrinks to half of the room, where the example cannot go on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers

from megatron_bert_tp.data.draws import Ints
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.parallel.cross_entropy import IGNORED
from megatron_bert_tp.tasks.examples import UNKNOWN_PLACE, Answer, AnswerExample
from megatron_bert_tp.tasks.feature_table import FeatureTable, Tokens, bounds_of
from megatron_bert_tp.tasks.task import Kind
from megatron_bert_tp.text.encoder import TextEncoder, windows

_QUESTIONS_AT_ONCE = 512  # their encodings know the characters of all tokens, and so are large
_CONTEXT = 1  # the second text of a pair


def answer_features(
    examples: Sequence[AnswerExample], encoder: TextEncoder, *, longest: int, overlap: int
) -> FeatureTable:
    """Windows of at most ``longest`` tokens, two neighbours with ``overlap`` tokens of the context in common.

    The first answer with a place is the label of an example; one that has answers, but no place of any, is
    ignored by the loss.  Leading blanks of a question are dropped.  DataError for a question that leaves no room
    for its context.
    """
    samples: list[_Window] = []
    numbers: list[int] = []
    for first in range(0, len(examples), _QUESTIONS_AT_ONCE):
        part = examples[first : first + _QUESTIONS_AT_ONCE]
        encodings = encoder.encoded([(each.question.lstrip(), each.context) for each in part])
        for number, (example, encoding) in enumerate(zip(part, encodings, strict=True), start=first):
            found = _windows_of(_Whole.of(encoding), example, longest=longest, overlap=overlap)
            samples += found
            numbers += [number] * len(found)
    return _table(samples, numbers, is_labelled=all(each.is_labelled for each in examples))


@dataclass(frozen=True)
class _Whole:
    """Question and context before they are cut: ``ids`` and ``types`` ``[tokens]``, ``spans`` ``[tokens, 2]``.

    ``context`` are the places of the tokens of the context; ``spans`` are -1 elsewhere.
    """

    ids: Tokens
    types: Tokens
    spans: Tokens
    context: Ints

    @classmethod
    def of(cls, encoding: tokenizers.Encoding) -> "_Whole":
        """From the library's encoding of a pair."""
        # As floats, since a token that is from neither text has None, which becomes nan.
        is_context = np.array(encoding.sequence_ids, dtype=np.float64) == _CONTEXT
        offsets = np.array(encoding.offsets, dtype=np.int32)
        return cls(
            ids=np.array(encoding.ids, dtype=np.int32),
            types=np.array(encoding.type_ids, dtype=np.int32),
            spans=np.where(is_context[:, None], offsets, np.int32(-1)),
            context=np.flatnonzero(is_context),
        )


@dataclass(frozen=True)
class _Window:
    ids: Tokens
    types: Tokens
    spans: Tokens
    label: tuple[int, int]


def _windows_of(whole: _Whole, example: AnswerExample, *, longest: int, overlap: int) -> list[_Window]:
    num_others = len(whole.ids) - len(whole.context)
    room = longest - num_others
    if room < 1:
        raise DataError(
            f"{example.place}: the question has {num_others - 3} tokens, and with [CLS] and [SEP] leaves no room "
            f"for its context among {longest}; shorten it, or raise data.sequence_length"
        )
    cuts = windows(len(whole.context), size=room, overlap=overlap)
    return [_window(whole, cut, example) for cut in cuts]


def _window(whole: _Whole, cut: range, example: AnswerExample) -> _Window:
    shown = whole.context[cut.start : cut.stop]
    first = int(whole.context[0]) if len(whole.context) else len(whole.ids)
    end = first + len(whole.context)
    places = np.concatenate([np.arange(first), shown, np.arange(end, len(whole.ids))])
    label = _label(whole.spans[shown], first, example)
    return _Window(whole.ids[places], whole.types[places], whole.spans[places], label)


def _label(spans: Tokens, first: int, example: AnswerExample) -> tuple[int, int]:
    """Places of the answer in a window whose context has these ``spans`` and begins at the place ``first``."""
    answer = next((each for each in example.answers if each.start != UNKNOWN_PLACE), None)
    if answer is None:
        # [CLS] would say that there is no answer; there is one, but nobody knows where.
        return (IGNORED, IGNORED) if example.answers else (0, 0)
    start, last = _answer_tokens(spans, answer)
    return (first + start, first + last) if start >= 0 else (0, 0)


def _answer_tokens(spans: Tokens, answer: Answer) -> tuple[int, int]:
    """First and last token of the answer among tokens with these ``spans``; -1 twice if it is not all there.

    A character between two tokens belongs to the one before at the start of an answer, and to the one behind at
    its end.
    """
    if not len(spans):
        return -1, -1
    first, end = answer.start, answer.start + len(answer.text)
    if spans[0, 0] > first or spans[-1, 1] < end:
        return -1, -1
    start = int(np.searchsorted(spans[:, 0], first, side="right")) - 1
    return start, int(np.searchsorted(spans[:, 1], end, side="left"))


def _table(samples: Sequence[_Window], numbers: Sequence[int], *, is_labelled: bool) -> FeatureTable:
    lengths = np.array([len(each.ids) for each in samples], dtype=np.int64)
    none = np.zeros(0, dtype=np.int32)
    labels = np.array([each.label for each in samples], dtype=np.int64).reshape(-1, 2)
    return FeatureTable(
        kind=Kind.ANSWER,
        ids=np.concatenate([none, *(each.ids for each in samples)]),
        types=np.concatenate([none, *(each.types for each in samples)]).astype(np.uint8),
        bounds=bounds_of(lengths),
        examples=np.array(numbers, dtype=np.int64),
        labels=labels if is_labelled else None,
        spans=np.concatenate([none.reshape(0, 2), *(each.spans for each in samples)]),
    )
