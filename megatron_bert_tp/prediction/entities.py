"""Spans of a text and their entity, grouped as `transformers`' pipeline groups them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_bert_tp.prediction.answers import Record
from megatron_bert_tp.prediction.heads import Output, Setup
from megatron_bert_tp.prediction.samples import Sample
from megatron_bert_tp.text.encoder import Row

OUTSIDE = "O"


@dataclass(frozen=True)
class Token:
    """One token of the text, its likeliest label, and its place: in the row, and as characters of the text."""

    label: str
    score: float
    index: int
    word: str
    start: int
    end: int

    @property
    def begins(self) -> bool:
        """Whether the label begins an entity (``B-``)."""
        return self.label.startswith("B-")

    @property
    def kind(self) -> str:
        """Label without ``B-`` or ``I-``."""
        return self.label[2:] if self.label.startswith(("B-", "I-")) else self.label


def entities(sample: Sample, rows: Sequence[Row], outputs: Sequence[Output], setup: Setup) -> Record:
    """Spans with their entity, or every token of one; what has the label ``O`` is left out."""
    ((logits,),) = outputs
    scores, best = logits.softmax(-1).max(-1)
    tokens = [
        Token(setup.labels[label], score, index, *_place(rows[0], index, sample.text, setup))
        for index, (label, score) in enumerate(zip(best.tolist(), scores.tolist(), strict=True))
        if rows[0].segments[index] is not None
    ]
    if setup.options.aggregation == "none":
        return {"entities": [_of_token(token) for token in tokens if token.label != OUTSIDE]}
    spans = [_of_group(group, setup) for group in groups(tokens)]
    return {"entities": [span for span in spans if span["entity"] != OUTSIDE]}


def groups(tokens: Iterable[Token]) -> list[list[Token]]:
    """Neighbours of the same kind; ``B-`` begins another group."""
    found: list[list[Token]] = []
    for token in tokens:
        if found and token.kind == found[-1][-1].kind and not token.begins:
            found[-1].append(token)
        else:
            found.append([token])
    return found


def _place(row: Row, index: int, text: str, setup: Setup) -> tuple[str, int, int]:
    """Piece and characters of a token; an unknown one is shown as it stands in the text."""
    start, end = row.offsets[index]
    number = row.ids[index]
    return text[start:end] if number == setup.encoder.unknown_id else setup.encoder.token(number), start, end


def _of_token(token: Token) -> Record:
    return {
        "entity": token.label,
        "score": token.score,
        "index": token.index,
        "word": token.word,
        "start": token.start,
        "end": token.end,
    }


def _of_group(group: Sequence[Token], setup: Setup) -> Record:
    return {
        # Not `kind`: the pipeline cuts any label at its first hyphen here.
        "entity": group[0].label.split("-", 1)[-1],
        "score": fmean(token.score for token in group),
        "word": setup.encoder.joined([token.word for token in group]),
        "start": group[0].start,
        "end": group[-1].end,
    }
