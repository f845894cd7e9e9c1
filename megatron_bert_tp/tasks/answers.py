"""From logits of windows to answers, as the reference post-processing of `transformers` has it.

That is `postprocess_qa_predictions` of its question-answering examples (``utils_qa.py``).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.tasks.examples import AnswerExample

Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.floating]
Flags = npt.NDArray[np.bool_]

NO_SPAN = "empty"
"""What the reference answers where no two of the best starts and ends make a span."""


class Windows(Protocol):
    """What is read of the features: each window a row, all of the same example one after another or not."""

    @property
    def bounds(self) -> Ints:
        """``[rows + 1]``: row r has the tokens ``bounds[r]`` to ``bounds[r + 1]``, the first of them [CLS]."""

    @property
    def examples(self) -> Ints:
        """``[rows]`` number of the example of each row."""

    @property
    def spans(self) -> Ints | None:
        """``[tokens, 2]`` first character in the context and the one after the last; -1 at other tokens."""


@dataclass(frozen=True)
class Limits:
    """How answers are looked for.

    ``n_best`` starts, ends and spans are looked at, of at most ``longest`` tokens.
    """

    n_best: int
    longest: int
    may_be_none: bool


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A span of the context, or without a place the sign that there is no answer (or `NO_SPAN`).

    ``start`` and ``end`` are characters.  ``score`` is the sum of the logits, ``probability`` its softmax over all
    that are kept.
    """

    text: str
    start: int | None
    end: int | None
    start_logit: float
    end_logit: float
    score: float
    probability: float


@dataclass(frozen=True)
class Answers:
    """The candidates of a question, the best first; ``span`` is the best that has text.

    ``odds`` is the score of no answer less that of ``span``; None where each question has an answer.
    """

    candidates: tuple[Candidate, ...]
    span: Candidate
    odds: float | None

    @property
    def null(self) -> Candidate | None:
        """The sign that there is no answer; None where each question has one."""
        return next((candidate for candidate in self.candidates if not candidate.text), None)

    def said(self, threshold: float) -> Candidate:
        """The answer: ``span``, or that there is none where the odds are above the threshold."""
        is_none = self.odds is not None and self.odds > threshold
        return (self.null if is_none else None) or self.span


@dataclass(frozen=True)
class _Spans:
    """Characters and logits, each ``[spans, 2]``, start and end; characters -1: no answer."""

    characters: Ints
    logits: Floats

    @property
    def scores(self) -> Floats:
        """``[spans]``, in the precision of the logits: so they rank as those of the reference."""
        scores: Floats = self.logits[:, 0] + self.logits[:, 1]
        return scores

    def taken(self, places: Ints) -> "_Spans":
        return _Spans(self.characters[places], self.logits[places])


def decoded(
    examples: Sequence[AnswerExample], table: Windows, logits: Floats, limits: Limits
) -> tuple[Answers, ...]:
    """Answers to all examples from the start and end logits ``[tokens, 2]`` of all their windows."""
    return tuple(
        _answers(example.context, [_window(table, row, logits, limits) for row in rows], limits)
        for example, rows in zip(examples, _rows_by_example(table, len(examples)), strict=True)
    )


def _rows_by_example(table: Windows, num_examples: int) -> Iterator[list[int]]:
    order = np.argsort(table.examples, kind="stable")
    bounds = np.searchsorted(table.examples[order], np.arange(num_examples + 1))
    for start, stop in pairwise(bounds.tolist()):
        yield order[start:stop].tolist()


def _window(table: Windows, row: int, logits: Floats, limits: Limits) -> _Spans:
    """No answer first, then the spans of the best starts and ends of a window, the best starts first."""
    assert table.spans is not None
    tokens = slice(table.bounds[row], table.bounds[row + 1])
    places, values = table.spans[tokens], logits[tokens]
    is_context = places[:, 0] >= 0
    starts, ends = (np.argsort(-values[:, side], kind="stable")[: limits.n_best] for side in (0, 1))
    start, end = np.repeat(starts, len(ends)), np.tile(ends, len(starts))
    is_kept = is_context[start] & is_context[end] & (start <= end) & (end - start < limits.longest)
    start, end = start[is_kept], end[is_kept]
    characters = np.stack([places[start, 0], places[end, 1]], axis=1)
    found = np.stack([values[start, 0], values[end, 1]], axis=1)
    return _Spans(np.concatenate([[[-1, -1]], characters]), np.concatenate([values[:1], found]))


def _answers(context: str, windows: Sequence[_Spans], limits: Limits) -> Answers:
    """Answers from all windows of an example."""
    # Windows must agree that there is no answer, so the lowest score of that counts.
    nulls = _joined([window.taken(np.array([0])) for window in windows])
    null = nulls.taken(np.array([np.argmin(nulls.scores)]))
    spans = _joined([window.taken(np.arange(1, len(window.logits))) for window in windows])
    known = _best([spans, null] if limits.may_be_none else [spans], limits.n_best)
    if limits.may_be_none and (known.characters[:, 0] >= 0).all():
        known = _joined([known, null])
    texts = [context[start:end] if start >= 0 else "" for start, end in known.characters.tolist()]
    if not any(texts):
        texts, known = [NO_SPAN, *texts], _joined([_Spans(np.array([[-1, -1]]), np.zeros((1, 2))), known])
    return _told(texts, known, null if limits.may_be_none else None)


def _best(parts: Sequence[_Spans], count: int) -> _Spans:
    """The spans of the highest scores; of equal ones the first."""
    spans = _joined(parts)
    return spans.taken(np.argsort(-spans.scores, kind="stable")[:count])


def _told(texts: Sequence[str], spans: _Spans, null: _Spans | None) -> Answers:
    """The spans with their texts, and how ``null`` compares with the best of them."""
    scores = spans.scores.astype(np.float64)
    weights = np.exp(scores - scores.max())
    rows = zip(texts, spans.characters.tolist(), spans.logits.tolist(), strict=True)
    candidates = tuple(
        Candidate(
            text=text,
            start=start if start >= 0 else None,
            end=end if end >= 0 else None,
            start_logit=first,
            end_logit=last,
            score=float(score),
            probability=float(share),
        )
        for (text, (start, end), (first, last)), score, share in zip(
            rows, scores, weights / weights.sum(), strict=True
        )
    )
    best = next(place for place, text in enumerate(texts) if text)
    odds = None if null is None else float(null.scores[0] - spans.logits[best, 0] - spans.logits[best, 1])
    return Answers(candidates, candidates[best], odds)


def _joined(parts: Sequence[_Spans]) -> _Spans:
    return _Spans(
        np.concatenate([part.characters for part in parts]), np.concatenate([part.logits for part in parts])
    )
