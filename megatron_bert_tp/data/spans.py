"""Runs of sentences that samples are made of: all possible ends at once, then a walk from end to end."""

from dataclasses import dataclass

import numpy as np

from megatron_bert_tp.data.corpus import Corpus
from megatron_bert_tp.data.draws import Ints, Purpose, below, draw, streams, uniform
from megatron_bert_tp.errors import DataError

NUM_SPECIAL = 3  # [CLS] A [SEP] B [SEP]


@dataclass(frozen=True)
class Spans:
    """The spans of one part of a corpus, in the order of the text; row i of every array is span i."""

    first: Ints
    """``[spans]`` first sentence."""
    last: Ints
    """``[spans]`` last sentence, exclusive; at least two after the first."""
    target: Ints
    """``[spans]`` tokens that the sample may have without special ones."""
    document: Ints
    """``[spans]`` index into ``documents``."""
    documents: Ints
    """``[documents]`` ascending numbers of the documents that have two sentences: the usable ones."""

    def __len__(self) -> int:
        return len(self.first)


def build_spans(corpus: Corpus, documents: Ints, *, sequence_length: int, short_share: float, seed: int) -> Spans:
    """Cut each of ``documents`` into spans of at least two sentences that hold the target length.

    A sentence joins a span until the target is reached; a lone last sentence joins the span before it.
    The target is ``sequence_length - 3`` or, for a ``short_share`` of the spans, evenly drawn from 2 on by
    (seed, first sentence).  DataError when fewer than two documents have two sentences, which next
    sentence prediction needs.  After Megatron-LM's ``build_mapping``.
    """
    usable = _usable_documents(corpus, documents)
    sizes = np.diff(corpus.documents)
    is_usable = np.zeros(corpus.num_documents, dtype=np.bool_)
    is_usable[usable] = True
    sentences = np.flatnonzero(np.repeat(is_usable, sizes))
    document = np.repeat(np.arange(len(usable)), sizes[usable])
    target = _targets(sentences, sequence_length - NUM_SPECIAL, short_share=short_share, seed=seed)
    following = _following(corpus, sentences, target, end=corpus.documents[usable + 1][document])
    chosen = _walk(following - sentences)
    return Spans(sentences[chosen], following[chosen], target[chosen], document[chosen], usable)


def _usable_documents(corpus: Corpus, documents: Ints) -> Ints:
    documents = np.sort(documents)
    usable = documents[np.diff(corpus.documents)[documents] >= 2]
    if len(usable) < 2:
        raise DataError(
            f"{corpus.prefix}: next sentence prediction needs two documents of two sentences, but of the "
            f"{len(documents)} documents of this part {len(usable)} have two sentences (the corpus has "
            f"{corpus.num_documents} documents, {corpus.num_sentences} sentences): separate documents, not "
            "sentences, by blank lines, give more text, or change data.split"
        )
    return usable


def _targets(sentences: Ints, longest: int, *, short_share: float, seed: int) -> Ints:
    """Target length of a span for each of the sentences that it might begin with."""
    stream = streams(seed, Purpose.SPAN, sentences)
    column = np.zeros(1, dtype=np.int64)
    is_short = uniform(draw(stream, column)) < short_share
    short = 2 + below(draw(stream, column + 1), longest - 1)
    return np.where(is_short, short, longest)


def _following(corpus: Corpus, sentences: Ints, target: Ints, *, end: Ints) -> Ints:
    """For each of the sentences, the end (exclusive) of a span that begins with it.

    ``end`` is the end of its document.
    """
    reached = np.searchsorted(corpus.starts, corpus.starts[sentences] + target)
    reached = np.maximum(reached, sentences + 2)
    return np.where(reached >= end - 1, end, reached)


def _walk(sizes: Ints) -> Ints:
    """Places of the spans' first sentences: a span begins where the one before it ends, over document ends too.

    ``sizes`` are the sentences of a span that begins with each of the usable documents' sentences.
    """
    jumps = sizes.tolist()
    firsts = []
    place = 0
    while place < len(jumps):
        firsts.append(place)
        place += jumps[place]
    return np.array(firsts, dtype=np.int64)
