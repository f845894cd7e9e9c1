"""Cross-entropy of a model that knows nothing but how often each token occurs: the bar a trained one must pass."""

from collections.abc import Callable

import numpy as np

from megatron_bert_tp.data.corpus.index import release
from megatron_bert_tp.data.corpus.mapped import Corpus
from megatron_bert_tp.data.draws import Ints

_BLOCK = 1 << 14  # documents
_TOKENS = 1 << 20


def unigram_counts(
    corpus: Corpus, documents: Ints, vocab_size: int, *, advance: Callable[[], None] = lambda: None
) -> Ints:
    """``[vocab_size]`` occurrences of each token in ``documents``; takes a byte of memory a document.

    ``advance`` is called now and then: a large corpus takes minutes.
    """
    is_counted = np.zeros(corpus.num_documents, dtype=np.bool_)
    is_counted[documents] = True
    counts = np.zeros(vocab_size, dtype=np.int64)
    for first in range(0, corpus.num_documents, _BLOCK):
        starts = corpus.starts_of(corpus.documents[first : first + _BLOCK + 1])
        advance()
        for begin in range(int(starts[0]), int(starts[-1]), _TOKENS):
            cuts = np.clip(starts, begin, begin + _TOKENS)
            is_kept = np.repeat(is_counted[first : first + _BLOCK], np.diff(cuts))
            counts += np.bincount(corpus.tokens[begin : int(cuts[-1])][is_kept], minlength=vocab_size)
        release(corpus.tokens)
    return counts


def unigram_cross_entropy(counts: Ints, targets: Ints) -> float:
    """Mean of -log p over ``targets`` in nats, with p = (count + 1) / (all counts + vocabulary)."""
    probabilities = (counts + 1) / (counts.sum() + len(counts))
    return float(-np.log(probabilities[targets]).mean())
