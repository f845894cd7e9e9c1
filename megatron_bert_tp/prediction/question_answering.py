"""The answer to a question as a span of the context, scored as `transformers` 4's pipeline scores it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.errors import ConfigError
from megatron_bert_tp.prediction.answers import Record
from megatron_bert_tp.prediction.arguments import Options
from megatron_bert_tp.prediction.heads import Output, Setup
from megatron_bert_tp.prediction.samples import Sample
from megatron_bert_tp.text.encoder import Row, TextEncoder

WINDOW, STRIDE = 384, 128
_NOWHERE = -10000.0  # logit of what is no part of the context
Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Span:
    """Characters of the context and the probability that they are the answer."""

    start: int
    end: int
    score: float


def context_windows(sample: Sample, encoder: TextEncoder, options: Options) -> list[Row]:
    """Rows with the whole question and a window of the context each."""
    size = min(encoder.longest, options.max_seq_len or WINDOW)
    overlap = options.doc_stride or min(size // 2, STRIDE)
    if overlap > size:
        raise ConfigError(f"--doc-stride ({overlap}) is more than the window ({size} tokens); give a smaller one")
    return encoder.windowed_rows(sample.text, sample.partners[0], size=size, overlap=overlap)


def answers(sample: Sample, rows: Sequence[Row], outputs: Sequence[Output], setup: Setup) -> Record:
    """The best answer, and the next best where more than one is wished for."""
    context, top = sample.partners[0], setup.options.top or 1
    # Some candidates come to the same words, so more are looked at than are told.
    num_candidates = 2 * top + 10
    spans = [
        span
        for row, (logits,) in zip(rows, outputs, strict=True)
        for span in candidates(
            row,
            logits.numpy(),
            cls_id=setup.encoder.cls_id,
            top=num_candidates,
            longest=setup.options.max_answer_len,
        )
    ]
    # Where [CLS] has all of the probability, there is no span at all.
    best = merged(spans, context)[:top] or [Span(0, 0, 0.0)]
    told = [_record(span, context) for span in best]
    return dict(told[0]) if top == 1 else {**told[0], "answers": told}


def candidates(row: Row, logits: Floats, *, cls_id: int, top: int, longest: int) -> list[Span]:
    """The likeliest spans of one window, which end at whole words.

    ``logits`` are ``[tokens, 2]``: start and end.  [CLS] takes its share of the probability, as the sign that
    there is no answer, but is none; spans have at most ``longest`` tokens.
    """
    is_context = np.array([segment == 1 for segment in row.segments])
    allowed = is_context | (np.array(row.ids) == cls_id)
    starts, ends = (_shares(logits[:, side], allowed) for side in (0, 1))
    scores = np.tril(np.triu(np.outer(starts, ends)), longest - 1).ravel()
    count = min(top, scores.size - 1)
    best = np.argpartition(-scores, count)[:count]
    order = best[np.argsort(-scores[best])]
    pairs = zip(*np.unravel_index(order, (len(row), len(row))), order, strict=True)
    return [
        Span(*whole_words(row, int(start), int(end)), score=float(scores[place]))
        for start, end, place in pairs
        if is_context[start] and is_context[end]
    ]


def whole_words(row: Row, start: int, end: int) -> tuple[int, int]:
    """Characters from the beginning of the word of token ``start`` to the end of that of token ``end``.

    Of a word that is cut by the window, only what the window shows.
    """
    first, last = start, end
    while first > 0 and _are_one_word(row, first - 1, start):
        first -= 1
    while last + 1 < len(row) and _are_one_word(row, last + 1, end):
        last += 1
    return row.offsets[first][0], row.offsets[last][1]


def merged(spans: Sequence[Span], context: str) -> list[Span]:
    """The spans, the best first; those with the same words count as one, and their scores are added."""
    found: dict[str, Span] = {}
    for span in spans:
        words = context[span.start : span.end].lower()
        first = found.get(words, Span(span.start, span.end, 0.0))
        found[words] = Span(first.start, first.end, first.score + span.score)
    return sorted(found.values(), key=lambda span: -span.score)


def _are_one_word(row: Row, one: int, other: int) -> bool:
    same_text = row.segments[one] == row.segments[other]
    return same_text and row.words[one] is not None and row.words[one] == row.words[other]


def _shares(logits: Floats, allowed: npt.NDArray[np.bool_]) -> Floats:
    """Softmax over the allowed tokens, of which the first, [CLS], is then set to 0."""
    masked = np.where(allowed, logits.astype(np.float64), _NOWHERE)
    weights = np.exp(masked - masked.max())
    shares: Floats = weights / weights.sum()
    shares[0] = 0.0
    return shares


def _record(span: Span, context: str) -> Record:
    text = context[span.start : span.end]
    return {"answer": text, "start": span.start, "end": span.end, "score": span.score}
