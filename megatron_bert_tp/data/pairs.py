"""Sentence pairs for next sentence prediction, cut to length and laid out as [CLS] A [SEP] B [SEP]."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.data.corpus import Corpus
from megatron_bert_tp.data.draws import Bits, Ints, Purpose, below, draw, streams
from megatron_bert_tp.data.spans import NUM_SPECIAL, Spans
from megatron_bert_tp.data.tokenizer import Vocabulary

_PIVOT, _IS_RANDOM, _DOCUMENT, _SENTENCE = np.arange(4)


@dataclass(frozen=True)
class Pairs:
    """Where the two halves of some samples stand in the corpus; row i of every array is sample i."""

    first_a: Ints
    """``[samples]`` first token of A."""
    length_a: Ints
    """``[samples]`` tokens of A, at least 1."""
    first_b: Ints
    length_b: Ints
    is_random: npt.NDArray[np.bool_]
    """``[samples]`` True where B is from another document; False where it follows A."""

    @property
    def lengths(self) -> Ints:
        """``[samples]`` tokens, the three special ones included."""
        return self.length_a + self.length_b + NUM_SPECIAL


@dataclass(frozen=True)
class Rows:
    """Samples before masking, padded to one width."""

    ids: Ints
    """``[samples, width]``, [PAD] behind the last [SEP]."""
    is_text: npt.NDArray[np.bool_]
    """``[samples, width]``, False at special tokens and padding."""
    types: Ints
    """``[samples, width]``: 1 in B and its [SEP]."""
    begins: npt.NDArray[np.bool_]
    """``[samples, width]``, True at the first token of A and of B, where a word begins in any case."""


def choose_pairs(corpus: Corpus, spans: Spans, chosen: Ints, *, seed: int, numbers: Ints) -> Pairs:
    """Pairs of the spans ``chosen`` (``[samples]``), drawn by (seed, sample number).

    A is the span up to a pivot; B the rest or, half of the time, sentences of another usable document
    up to the target length (Devlin et al. 2018, section 3.1).  Too long pairs are cut as `truncate` says.
    """
    first, last, target = spans.first[chosen], spans.last[chosen], spans.target[chosen]
    bits = draw(streams(seed, Purpose.PAIR, numbers)[:, None], np.arange(4))
    pivot = first + 1 + below(bits[:, _PIVOT], last - first - 1)
    is_random = bits[:, _IS_RANDOM] >> np.uint64(63) == 1
    first_a = corpus.starts[first]
    end_a = corpus.starts[pivot]
    random_b = _random_b(corpus, spans, spans.document[chosen], wanted=target - (end_a - first_a), bits=bits)
    first_b = np.where(is_random, random_b[0], end_a)
    end_b = np.where(is_random, random_b[1], corpus.starts[last])
    pairs = Pairs(first_a, end_a - first_a, first_b, end_b - first_b, is_random)
    return truncate(pairs, target, seed=seed, numbers=numbers)


def truncate(pairs: Pairs, target: Ints, *, seed: int, numbers: Ints) -> Pairs:
    """Take tokens from the longer half (B when equal) until ``target``, each from its front or back by a coin."""
    length_a = np.minimum(pairs.length_a, np.maximum((target + 1) // 2, target - pairs.length_b))
    length_b = np.minimum(pairs.length_b, target - length_a)
    cut_a, cut_b = pairs.length_a - length_a, pairs.length_b - length_b
    if not np.any(cut_a + cut_b):
        return pairs
    stream = streams(seed, Purpose.TRUNCATION, numbers)
    front_a = _heads(stream, cut_a)
    front_b = _heads(stream, cut_a + cut_b) - front_a
    first_a, first_b = pairs.first_a + front_a, pairs.first_b + front_b
    return Pairs(first_a, length_a, first_b, length_b, pairs.is_random)


def lay_out(tokens: npt.NDArray[Any], pairs: Pairs, vocabulary: Vocabulary, *, width: int) -> Rows:
    """The samples as rows ``[CLS] A [SEP] B [SEP] [PAD]...``; ``tokens`` are the corpus'."""
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
    return Rows(ids, is_text, types.astype(np.int64), (column == 1) | (column == first_sep + 1))


def _random_b(corpus: Corpus, spans: Spans, own: Ints, *, wanted: Ints, bits: Bits) -> tuple[Ints, Ints]:
    """First token and end of sentences of another document that hold ``wanted`` tokens or reach its end."""
    other = below(bits[:, _DOCUMENT], len(spans.documents) - 1)
    document = spans.documents[other + (other >= own)]
    begin, end = corpus.documents[document], corpus.documents[document + 1]
    sentence = begin + below(bits[:, _SENTENCE], end - begin)
    first = corpus.starts[sentence]
    last = np.searchsorted(corpus.starts, first + np.maximum(wanted, 1))
    return first, corpus.starts[np.minimum(last, end)]


def _heads(stream: Bits, count: Ints) -> Ints:
    """``[samples]`` heads among the first ``count`` coins of each stream, 64 coins a draw."""
    words = np.arange(int(count.max()) // 64 + 1)
    coins = np.clip(count[:, None] - 64 * words, 0, 64).astype(np.uint64)
    # In two shifts: one by the whole 64 bits of a word is undefined.
    full = coins >> np.uint64(6)
    mask = ~(np.uint64(2**64 - 1) << (coins - full) << full)
    heads: Ints = np.bitwise_count(draw(stream[:, None], words) & mask).sum(axis=1, dtype=np.int64)
    return heads
