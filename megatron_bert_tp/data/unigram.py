"""Cross-entropy of a model that knows nothing but how often each token occurs: the bar a trained one must pass."""

import numpy as np

from megatron_bert_tp.data.corpus import Corpus
from megatron_bert_tp.data.draws import Ints

_BLOCK = 1 << 16  # sentences


def unigram_counts(corpus: Corpus, documents: Ints, vocab_size: int) -> Ints:
    """``[vocab_size]`` occurrences of each token in ``documents``."""
    is_counted = np.zeros(corpus.num_documents, dtype=np.bool_)
    is_counted[documents] = True
    is_counted = np.repeat(is_counted, np.diff(corpus.documents))
    counts = np.zeros(vocab_size, dtype=np.int64)
    for first in range(0, corpus.num_sentences, _BLOCK):
        last = min(first + _BLOCK, corpus.num_sentences)
        tokens = corpus.tokens[corpus.starts[first] : corpus.starts[last]]
        kept = tokens[np.repeat(is_counted[first:last], corpus.lengths[first:last])]
        counts += np.bincount(kept, minlength=vocab_size)
    return counts


def unigram_cross_entropy(counts: Ints, targets: Ints) -> float:
    """Mean of -log p over ``targets`` in nats, with p = (count + 1) / (all counts + vocabulary)."""
    probabilities = (counts + 1) / (counts.sum() + len(counts))
    return float(-np.log(probabilities[targets]).mean())
