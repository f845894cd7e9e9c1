from collections import Counter

import numpy as np
import pytest

from megatron_bert_tp.data.corpus import unigram
from megatron_bert_tp.data.corpus.unigram import unigram_counts, unigram_cross_entropy


@pytest.mark.parametrize(("block", "tokens"), [(1, 1), (5, 20), (7, 54), (1000, 100), (1000, 10**6)])
def test_counts_are_those_of_the_given_documents(write_corpus, monkeypatch, block, tokens):
    monkeypatch.setattr(unigram, "_BLOCK", block)
    monkeypatch.setattr(unigram, "_TOKENS", tokens)
    draws = np.random.default_rng(0)
    documents = [[draws.integers(5, 50, size=6).tolist() for _ in range(9)] for _ in range(12)]
    corpus = write_corpus(documents)
    expected = Counter(token for n in (0, 3, 11) for sentence in documents[n] for token in sentence)
    counts = unigram_counts(corpus, np.array([3, 0, 11]), 200)
    assert dict(enumerate(counts.tolist())) == {token: expected[token] for token in range(200)}


def test_cross_entropy_is_the_mean_of_add_one_surprises():
    counts, targets = np.array([3, 0, 1]), np.array([0, 1, 1, 2])
    expected = -(np.log(4 / 7) + 2 * np.log(1 / 7) + np.log(2 / 7)) / 4
    assert unigram_cross_entropy(counts, targets) == pytest.approx(expected, rel=1e-15)
