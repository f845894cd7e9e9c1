"""What decides where the spans of a corpus begin and end."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_bert_tp.data.draws import Ints, Purpose, below, draw, streams, uniform

NUM_SPECIAL = 3  # [CLS] A [SEP] B [SEP]

PairTask = Literal["nsp", "sop", "none"]


@dataclass(frozen=True)
class Need:
    """What a task asks of a corpus."""

    sentences: int
    """Least sentences of a document and of a span."""
    documents: int
    """Least documents with so many sentences."""
    num_special: int
    """Tokens of a sample that are not text."""
    name: str
    way_out: str
    """What to do where a corpus has too few."""


_TEXT = "give more text, or change data.split"
_LINES = "separate documents, not sentences, by blank lines"
_OTHERS = "set objective.pairs=sop (one such document is enough) or none (single sentences are)"
_NEEDS: dict[PairTask, Need] = {
    "nsp": Need(2, 2, NUM_SPECIAL, "objective.pairs=nsp", f"{_LINES}, {_OTHERS}, {_TEXT}"),
    "sop": Need(2, 1, NUM_SPECIAL, "objective.pairs=sop", f"{_LINES}, set objective.pairs=none, {_TEXT}"),
    "none": Need(1, 1, NUM_SPECIAL - 1, "objective.pairs=none", _TEXT),
}


@dataclass(frozen=True, kw_only=True)
class SpanRule:
    """What decides where spans begin and end."""

    sequence_length: int
    short_share: float
    """Share of the spans with a random shorter target."""
    seed: int
    pairs: PairTask = "nsp"

    @property
    def need(self) -> Need:
        """What the task asks of a corpus."""
        return _NEEDS[self.pairs]

    @property
    def longest(self) -> int:
        """Text tokens of a full sample."""
        return self.sequence_length - self.need.num_special

    def targets(self, sentences: Ints) -> Ints:
        """Target length of a span for each of the sentences that it might begin with."""
        target = np.full(len(sentences), self.longest)
        if self.short_share == 0:
            return target
        stream = streams(self.seed, Purpose.SPAN, sentences)
        column = np.zeros(1, dtype=np.int64)
        short = np.flatnonzero(uniform(draw(stream, column)) < self.short_share)
        target[short] = 2 + below(draw(stream[short], column + 1), self.longest - 1)
        return target
