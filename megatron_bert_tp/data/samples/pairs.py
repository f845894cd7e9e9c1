"""Sentence pairs of the three pretraining tasks, cut to length and laid out as rows of ids."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.data.corpus.mapped import Corpus
from megatron_bert_tp.data.draws import Bits, Ints, Purpose, below, draw, streams
from megatron_bert_tp.data.samples.span_rule import PairTask
from megatron_bert_tp.data.samples.spans import Spans
from megatron_bert_tp.data.tokenizer import Vocabulary

NO_LABEL = -100
"""Label of a sample without a pair; the losses pass it over."""

_PIVOT, _LABEL, _DOCUMENT, _SENTENCE = np.arange(4)
"""Columns of `Purpose.PAIR`."""


@dataclass(frozen=True)
class Pairs:
    """Where the two halves of some samples stand in the corpus; row i of every array is sample i."""

    first_a: Ints
    """``[samples]`` first token of A."""
    length_a: Ints
    """``[samples]`` tokens of A, at least 1."""
    first_b: Ints
    length_b: Ints
    """``[samples]`` tokens of B, at least 1, or 0 where there is no B."""
    labels: Ints
    """``[samples]`` what the pair's head has to tell: 0 where B follows A, 1 where it does not, -100: nothing."""
    corpus: Ints
    """``[samples]`` which corpus of a blend they stand in."""

    @property
    def lengths(self) -> Ints:
        """``[samples]`` tokens with the special ones: [CLS] A [SEP] B [SEP], or [CLS] A [SEP] without B."""
        return self.length_a + self.length_b + 2 + (self.length_b > 0)

    def take(self, rows: Ints) -> "Pairs":
        """The samples at ``rows`` of these, in that order."""
        return Pairs(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class Rows:
    """Samples before masking, padded to one width."""

    ids: Ints
    """``[samples, width]``, [PAD] behind the last [SEP]."""
    is_text: npt.NDArray[np.bool_]
    """``[samples, width]``, False at special tokens and padding."""
    types: Ints
    """``[samples, width]``: 1 in B and its [SEP]."""


def choose_pairs(
    corpus: Corpus, spans: Spans, chosen: Ints, *, seed: int, numbers: Ints, task: PairTask = "nsp"
) -> Pairs:
    """Samples of the spans ``chosen`` (``[samples]``), drawn by (seed, sample number) and cut by `truncate`.

    ``nsp``: A is the span up to a pivot; B the rest or, half of the time, sentences of another usable
    document up to the target length (Devlin et al. 2018, section 3.1).  ``sop``: A and B are the two
    parts of the span, half of the time in the wrong order (Lan et al. 2019, section 3.1; what Megatron-LM
    trains).  ``none``: A is the span and there is no B.  Only ``none`` takes spans of one sentence.
    """
    bits = draw(streams(seed, Purpose.PAIR, numbers)[:, None], np.arange(4))
    pairs = _TASKS[task](corpus, spans, chosen, bits)
    return truncate(pairs, spans.target[chosen], seed=seed, numbers=numbers)


def _next_sentence(corpus: Corpus, spans: Spans, chosen: Ints, bits: Bits) -> Pairs:
    pairs = _two_parts(corpus, spans, chosen, bits)
    is_random = bits[:, _LABEL] >> np.uint64(63) == 1
    random = np.flatnonzero(is_random)
    wanted = spans.target[chosen[random]] - pairs.length_a[random]
    own = spans.document[chosen[random]]
    first_b, length_b = pairs.first_b.copy(), pairs.length_b.copy()
    first_b[random], length_b[random] = _random_b(corpus, spans, own, wanted=wanted, bits=bits[random])
    return replace(pairs, first_b=first_b, length_b=length_b, labels=is_random.astype(np.int64))


def _sentence_order(corpus: Corpus, spans: Spans, chosen: Ints, bits: Bits) -> Pairs:
    pairs = _two_parts(corpus, spans, chosen, bits)
    is_swapped = bits[:, _LABEL] >> np.uint64(63) == 1
    return replace(
        pairs,
        first_a=np.where(is_swapped, pairs.first_b, pairs.first_a),
        length_a=np.where(is_swapped, pairs.length_b, pairs.length_a),
        first_b=np.where(is_swapped, pairs.first_a, pairs.first_b),
        length_b=np.where(is_swapped, pairs.length_a, pairs.length_b),
        labels=is_swapped.astype(np.int64),
    )


def _one_segment(corpus: Corpus, spans: Spans, chosen: Ints, _bits: Bits) -> Pairs:
    first, end = corpus.starts_of(spans.first[chosen]), corpus.starts_of(spans.last[chosen])
    zeros = np.zeros_like(first)
    return Pairs(first, end - first, end, zeros, zeros + NO_LABEL, zeros)


_TASKS: dict[PairTask, Callable[[Corpus, Spans, Ints, Bits], Pairs]] = {
    "nsp": _next_sentence,
    "sop": _sentence_order,
    "none": _one_segment,
}


def _two_parts(corpus: Corpus, spans: Spans, chosen: Ints, bits: Bits) -> Pairs:
    """Spans cut at a sentence, every one but the first alike; label 0."""
    first, last = spans.first[chosen], spans.last[chosen]
    assert np.all(last - first >= 2), "a span of one sentence has no pair"
    pivot = first + 1 + below(bits[:, _PIVOT], last - first - 1)
    first_a, first_b, end = corpus.starts_of(first), corpus.starts_of(pivot), corpus.starts_of(last)
    zeros = np.zeros_like(first_a)
    return Pairs(first_a, first_b - first_a, first_b, end - first_b, zeros, zeros)


def truncate(pairs: Pairs, target: Ints, *, seed: int, numbers: Ints) -> Pairs:
    """Take tokens from the longer half until ``target`` are left, each from its front or back by a coin.

    From B where both are equally long, which is the second half as it will be read: after a swap, the
    earlier text.
    """
    length_a = np.minimum(pairs.length_a, np.maximum((target + 1) // 2, target - pairs.length_b))
    length_b = np.minimum(pairs.length_b, target - length_a)
    cut_a, cut_b = pairs.length_a - length_a, pairs.length_b - length_b
    if not np.any(cut_a + cut_b):
        return pairs
    stream = streams(seed, Purpose.TRUNCATION, numbers)
    front_a = _heads(stream, cut_a)
    front_b = _heads(stream, cut_a + cut_b) - front_a
    first_a, first_b = pairs.first_a + front_a, pairs.first_b + front_b
    return replace(pairs, first_a=first_a, length_a=length_a, first_b=first_b, length_b=length_b)


def lay_out(tokens: npt.NDArray[Any], pairs: Pairs, vocabulary: Vocabulary, *, width: int) -> Rows:
    """The samples as rows ``[CLS] A [SEP] B [SEP] [PAD]...``; ``tokens`` are the corpus'.

    Without a B the row is ``[CLS] A [SEP] [PAD]...``.
    """
    column = np.arange(width)
    first_sep = pairs.length_a[:, None] + 1
    last_sep = pairs.lengths[:, None] - 1
    in_a = (column >= 1) & (column < first_sep)
    types = (column > first_sep) & (column <= last_sep)
    in_b = types & (column < last_sep)
    is_text = in_a | in_b
    place = np.where(in_a, pairs.first_a[:, None] - 1, (pairs.first_b - pairs.length_a - 2)[:, None]) + column
    ids = np.full(is_text.shape, vocabulary.pad_id, dtype=np.int64)
    ids[is_text] = tokens[place[is_text]]
    ids[:, 0] = vocabulary.cls_id
    ids[(column == first_sep) | (column == last_sep)] = vocabulary.sep_id
    return Rows(ids, is_text, types.astype(np.int64))


def _random_b(corpus: Corpus, spans: Spans, own: Ints, *, wanted: Ints, bits: Bits) -> tuple[Ints, Ints]:
    """First token and length of sentences of another document that hold ``wanted`` tokens or reach its end."""
    other = below(bits[:, _DOCUMENT], len(spans.documents) - 1)
    document = spans.documents[other + (other >= own)]
    begin, end = corpus.documents[document], corpus.documents[document + 1]
    sentence = begin + below(bits[:, _SENTENCE], end - begin)
    first = corpus.starts_of(sentence)
    wanted = np.maximum(wanted, 1)
    # No further than as many sentences as tokens are wanted, for none is empty.
    last = _first_boundary(corpus, first + wanted, low=sentence + 1, high=np.minimum(sentence + wanted, end))
    return first, corpus.starts_of(last) - first


def _first_boundary(corpus: Corpus, place: Ints, *, low: Ints, high: Ints) -> Ints:
    """``[samples]`` first sentence of low..high that begins at token ``place`` or later, or ``high``."""
    while np.any(low < high):
        middle = (low + high) // 2
        is_before = corpus.starts_of(middle) < place
        low = np.where(is_before & (low < high), middle + 1, low)
        high = np.where(is_before, high, middle)
    return high


def _heads(stream: Bits, count: Ints) -> Ints:
    """``[samples]`` heads among the first ``count`` coins of each stream, 64 coins a draw, the low bit first."""
    draws = count // 64 + 1
    sample = np.repeat(np.arange(len(count)), draws)
    begin = np.cumsum(draws) - draws
    column = np.arange(len(sample)) - begin[sample]
    coins = np.clip(count[sample] - 64 * column, 0, 64).astype(np.uint64)
    # In two shifts: one by the whole 64 bits of a word is undefined.
    full = coins >> np.uint64(6)
    mask = ~(np.uint64(2**64 - 1) << (coins - full) << full)
    heads: Ints = np.add.reduceat(np.bitwise_count(draw(stream[sample], column) & mask), begin, dtype=np.int64)
    return heads
