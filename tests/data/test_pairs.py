import numpy as np
import pytest

from megatron_bert_tp.data.samples.pairs import Pairs, truncate
from tests.data.corpora import (
    FIRST,
    halves,
    make_batches,
    numbered_documents,
    numbered_vocabulary,
    random_shape,
    restored,
    starts_of,
)

NUM_SAMPLES = 20_000


@pytest.fixture(scope="module")
def vocabulary():
    return numbered_vocabulary()


@pytest.fixture
def corpus(write_corpus):
    return write_corpus(numbered_documents(random_shape(100)))


def owners(corpus, tokens):
    """Documents that the tokens stand in, from their ids."""
    sentences = np.searchsorted(starts_of(corpus), tokens - FIRST, side="right") - 1
    return set((np.searchsorted(corpus.documents, sentences, side="right") - 1).tolist())


def test_half_of_the_samples_have_a_random_b(corpus, vocabulary):
    """5 sigma of a binomial: 354 of 20,000."""
    labels = make_batches(corpus, vocabulary).batch(np.arange(NUM_SAMPLES)).next_sentence_labels
    assert set(labels.tolist()) == {0, 1}
    assert abs(int(labels.sum()) - NUM_SAMPLES / 2) < 5 * np.sqrt(NUM_SAMPLES / 4)


@pytest.mark.parametrize("num_documents", [2, 100])
def test_random_b_is_from_another_document_and_any_other_b_follows_a(write_corpus, vocabulary, num_documents):
    shape = random_shape(num_documents, seed=3, sentences=(2, 30))
    corpus = write_corpus(numbered_documents(shape))
    batch = make_batches(corpus, vocabulary).batch(np.arange(2000))
    sentence_starts = starts_of(corpus) + FIRST
    for row, label in zip(restored(batch), batch.next_sentence_labels.tolist(), strict=True):
        a, b = halves(row)
        assert min(len(a), len(b)) >= 1
        assert set(np.diff(a)) | set(np.diff(b)) <= {1}
        assert len(owners(corpus, a)) == len(owners(corpus, b)) == 1
        if label:
            assert owners(corpus, a) != owners(corpus, b)
        else:
            assert owners(corpus, a) == owners(corpus, b)
            # B begins with a sentence that A ends before; only what truncation took lies between.
            assert np.any((sentence_starts > a[-1]) & (sentence_starts <= b[0]))


def test_no_token_is_from_outside_the_usable_documents_of_the_part(write_corpus, vocabulary):
    corpus = write_corpus(numbered_documents(random_shape(60, sentences=(1, 4))))
    documents = np.arange(60)[::4]
    usable = {n for n in documents.tolist() if np.diff(corpus.documents)[n] > 1}
    batch = make_batches(corpus, vocabulary, documents=documents).batch(np.arange(2000))
    rows = restored(batch)
    assert 2 < len(usable) < len(documents)
    assert owners(corpus, rows[rows >= FIRST]) == usable


def test_untruncated_b_begins_where_a_ends(write_corpus, vocabulary):
    corpus = write_corpus(numbered_documents(random_shape(100, sentences=(2, 8))))
    batch = make_batches(corpus, vocabulary, sequence_length=512, short_share=0.0).batch(np.arange(500))
    for row, label in zip(restored(batch), batch.next_sentence_labels.tolist(), strict=True):
        a, b = halves(row)
        assert set(a[:1] - FIRST) | set(b[:1] - FIRST) <= set(starts_of(corpus))
        assert label == (b[0] != a[-1] + 1) or label  # a random B may happen to be the next document
        assert label or set(b[-1:] + 1 - FIRST) <= set(starts_of(corpus))


def test_every_sentence_of_a_span_can_begin_b(write_corpus, vocabulary):
    """Pivots of 5-sentence spans are even over 1..4: 5 sigma of a binomial."""
    corpus = write_corpus(numbered_documents([[1] * 5] * 200))
    batch = make_batches(corpus, vocabulary, sequence_length=8, short_share=0.0).batch(np.arange(8000))
    is_next = batch.next_sentence_labels.numpy() == 0
    rows = restored(batch)[is_next]
    lengths = np.bincount([len(halves(row)[0]) for row in rows])
    assert lengths[0] == 0
    assert len(lengths) == 5
    assert np.abs(lengths[1:] - len(rows) / 4).max() < 5 * np.sqrt(len(rows) * 3 / 16)


def test_every_other_document_is_drawn(write_corpus, vocabulary):
    """11 other documents, even: 5 sigma of a binomial."""
    corpus = write_corpus(numbered_documents([[2, 3]] * 12))
    batches = make_batches(corpus, vocabulary)
    numbers = np.arange(24_000)
    batch = batches.batch(numbers)
    drawn = np.zeros((12, 12), dtype=int)
    for row, label in zip(restored(batch), batch.next_sentence_labels.tolist(), strict=True):
        a, b = halves(row)
        drawn[owners(corpus, a).pop(), owners(corpus, b).pop()] += label
    assert (np.diag(drawn) == 0).all()
    others = drawn[~np.eye(12, dtype=bool)]
    assert np.abs(others - others.mean()).max() < 5 * np.sqrt(others.mean())


def lengths_one_by_one(a, b, target):
    while a + b > target:
        a, b = (a - 1, b) if a > b else (a, b - 1)
    return a, b


def test_truncation_leaves_the_lengths_of_the_references_loop():
    draws = np.random.default_rng(0)
    a, b, target = draws.integers(1, 60, 3000), draws.integers(1, 60, 3000), draws.integers(2, 70, 3000)
    first_b = np.full(3000, 1000)
    zeros = np.zeros(3000, dtype=np.int64)
    pairs = Pairs(zeros, a, first_b, b, zeros, zeros)
    cut = truncate(pairs, target, seed=1, numbers=np.arange(3000))
    expected = [lengths_one_by_one(*row) for row in np.stack([a, b, target], axis=1).tolist()]
    assert list(zip(cut.length_a.tolist(), cut.length_b.tolist(), strict=True)) == expected
    for first, length, old_first, old_length in (
        (cut.first_a, cut.length_a, 0, a),
        (cut.first_b, cut.length_b, 1000, b),
    ):
        assert (first >= old_first).all()
        assert (first + length <= old_first + old_length).all()


def test_each_cut_token_is_from_the_front_with_probability_one_half():
    """Cuts of 500 tokens: mean 250, standard deviation sqrt(500) / 2; over 4000 pairs 5 sigma."""
    ones = np.ones(4000, dtype=np.int64)
    pairs = Pairs(0 * ones, 700 * ones, 1000 * ones, 700 * ones, 0 * ones, 0 * ones)
    cut = truncate(pairs, 400 * ones, seed=1, numbers=np.arange(4000))
    sigma = np.sqrt(500) / 2
    for front in (cut.first_a, cut.first_b - 1000):
        assert abs(front.mean() - 250) < 5 * sigma / np.sqrt(4000)
        assert abs(front.std() - sigma) < 0.1 * sigma
    assert abs(np.corrcoef(cut.first_a, cut.first_b)[0, 1]) < 5 / np.sqrt(4000)
