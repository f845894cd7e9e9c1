"""From sentence to sentence to the ends of spans, for all documents of a block of the corpus at once."""

from dataclasses import dataclass, fields

import numpy as np

from megatron_bert_tp.data.corpus.mapped import Corpus
from megatron_bert_tp.data.draws import Ints
from megatron_bert_tp.data.samples.span_rule import SpanRule

_BLOCK = 1 << 18  # sentences; the tokens before each of them fit a core's cache
_FEW = 128  # documents: with fewer, all their sentences at once cost less than a round for each span


@dataclass(frozen=True)
class Block:
    """Some whole documents of a corpus, or a stretch of one that is longer than a block."""

    document: int
    """The first of its documents."""
    bounds: Ints
    """``[documents + 1]`` first sentence of each of its documents, then the end of the last."""
    tokens: Ints
    """``[sentences + 1]`` tokens of the block before each of its sentences, then all."""
    is_cut: bool
    """Whether its one document goes on behind it."""
    next_document: int
    """The first behind it."""
    next_sentence: int

    @classmethod
    def read(cls, corpus: Corpus, document: int, sentence: int, rule: SpanRule) -> "Block":
        """The block that begins with ``sentence`` of ``document``."""
        # A span has at most one sentence more than its target, so that at least one ends in a cut block.
        end = sentence + max(_BLOCK, 2 * rule.sequence_length)
        bounds = corpus.documents[document : document + _BLOCK + 1].astype(np.int64)
        bounds[0] = sentence
        fitting = int(np.searchsorted(bounds, end, side="right")) - 1
        next_sentence = int(bounds[max(fitting, 1)])
        is_cut = fitting == 0
        bounds = np.array([sentence, end]) if is_cut else bounds[: fitting + 1]
        tokens = np.zeros(bounds[-1] - sentence + 1, dtype=np.int64)
        np.cumsum(corpus.lengths[sentence : bounds[-1]], dtype=np.int64, out=tokens[1:])
        return cls(document, bounds, tokens, is_cut, document + max(fitting, 1), next_sentence)


@dataclass(frozen=True)
class Walked:
    """Spans of a block: sentences are counted from its beginning, documents among its usable ones."""

    first: Ints
    """``[spans]``, as are the others; ``last`` is exclusive."""
    last: Ints
    target: Ints
    document: Ints

    def take(self, rows: Ints | slice) -> "Walked":
        """The spans at ``rows`` of these."""
        return Walked(*(getattr(self, field.name)[rows] for field in fields(self)))


def walk(block: Block, usable: Ints, rule: SpanRule) -> Walked:
    """Spans of the ``usable`` documents of a block, in the order of the text.

    Every round closes one span of every document that is not at its end.  When few are left, the long ones,
    the ends of all spans that could begin in them are found at once.
    """
    begin = block.bounds[0]
    position, end = block.bounds[usable] - begin, block.bounds[usable + 1] - begin
    document = np.arange(len(usable))
    rounds = []
    while len(position) > _FEW:
        following, target = _following(block, position, end, rule)
        rounds.append(Walked(position, following, target, document))
        goes_on = np.flatnonzero(following < end)
        position, end, document = following[goes_on], end[goes_on], document[goes_on]
    rounds.append(_walk_all_sentences(block, position, end, document, rule))
    walked = Walked(*(np.concatenate([getattr(each, f.name) for each in rounds]) for f in fields(Walked)))
    row = np.full(len(block.tokens), -1)  # of the span that begins with each sentence
    row[walked.first] = np.arange(len(walked.first))
    return walked.take(row[row >= 0])


def _following(block: Block, position: Ints, end: Ints, rule: SpanRule) -> tuple[Ints, Ints]:
    """For each of the sentences ``position``, the end (exclusive) and the target of a span that begins with it.

    ``end`` is the end of its document.
    """
    target = rule.targets(block.bounds[0] + position)
    reached = np.searchsorted(block.tokens, block.tokens[position] + target)
    reached = np.maximum(reached, position + rule.need.sentences)
    return np.where(reached >= end - 1, end, reached), target


def _walk_all_sentences(block: Block, position: Ints, end: Ints, document: Ints, rule: SpanRule) -> Walked:
    """Spans of the stretches ``position`` to ``end`` of some documents, from the ends of all possible spans."""
    sizes = end - position
    owner = np.repeat(np.arange(len(sizes)), sizes)
    sentences = np.arange(sizes.sum()) + (position - np.cumsum(sizes) + sizes)[owner]
    following, target = _following(block, sentences, end[owner], rule)
    chosen = _jump(following - sentences)
    return Walked(sentences[chosen], following[chosen], target[chosen], document[owner[chosen]])


def _jump(sizes: Ints) -> Ints:
    """Places of the spans' first sentences: a span begins where the one before it ends, over document ends too.

    ``sizes`` are the sentences of a span that begins with each of the sentences.
    """
    jumps = sizes.tolist()
    firsts = []
    place = 0
    while place < len(jumps):
        firsts.append(place)
        place += jumps[place]
    return np.array(firsts, dtype=np.int64)
