import time

import numpy as np
import pytest

from megatron_bert_tp.data.corpus import Corpus
from megatron_bert_tp.data.spans import build_spans
from megatron_bert_tp.errors import DataError
from tests.data.corpora import numbered_documents, random_shape


def spans_one_by_one(shape, documents, targets):
    """The walk as `build_mapping` of Megatron-LM describes it; targets are used up in order."""
    targets = iter(targets)
    spans, first_of_document = [], np.cumsum([0, *map(len, shape)])
    for document in documents:
        lengths = shape[document]
        if len(lengths) < 2:
            continue
        begin, tokens, target = 0, 0, next(targets)
        for sentence, length in enumerate(lengths):
            tokens += length
            remaining = len(lengths) - sentence - 1
            closes = tokens >= target and remaining > 1 and sentence - begin >= 1
            if closes or remaining == 0:
                spans.append((first_of_document[document] + begin, first_of_document[document] + sentence + 1))
                begin, tokens = sentence + 1, 0
                target = next(targets) if remaining else None
    return spans


@pytest.mark.parametrize("short_share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("sequence_length", [8, 32, 128])
def test_spans_equal_the_references_walk(write_corpus, sequence_length, short_share):
    shape = random_shape(80)
    corpus = write_corpus(numbered_documents(shape))
    documents = np.arange(0, 80, 3)
    spans = build_spans(corpus, documents, sequence_length=sequence_length, short_share=short_share, seed=7)
    expected = spans_one_by_one(shape, documents.tolist(), spans.target.tolist())
    assert list(zip(spans.first.tolist(), spans.last.tolist(), strict=True)) == expected
    owner = np.repeat(np.arange(80), [len(lengths) for lengths in shape])
    assert spans.documents[spans.document].tolist() == owner[spans.first].tolist()


def test_every_sentence_of_a_usable_document_is_in_exactly_one_span(write_corpus):
    shape = random_shape(50, seed=1)
    corpus = write_corpus(numbered_documents(shape))
    spans = build_spans(corpus, np.arange(50), sequence_length=32, short_share=0.5, seed=7)
    covered = np.concatenate([np.arange(a, b) for a, b in zip(spans.first, spans.last, strict=True)])
    owner = np.repeat(np.arange(50), [len(lengths) for lengths in shape])
    expected = [n for n, document in enumerate(owner) if len(shape[document]) > 1]
    assert covered.tolist() == expected
    assert (spans.last - spans.first).min() >= 2


def test_spans_of_a_document_are_the_same_in_every_part(write_corpus):
    shape = random_shape(30, seed=2, sentences=(2, 30))
    corpus = write_corpus(numbered_documents(shape))
    options = {"sequence_length": 32, "short_share": 0.3, "seed": 7}
    whole = build_spans(corpus, np.arange(30), **options)
    part = build_spans(corpus, np.array([4, 5, 28]), **options)
    kept = np.isin(whole.document, [4, 5, 28])
    for name in ("first", "last", "target"):
        assert getattr(part, name).tolist() == getattr(whole, name)[kept].tolist()


def test_targets_are_short_for_their_share_and_within_bounds(write_corpus):
    """5 sigma of a binomial."""
    corpus = write_corpus(numbered_documents([[1] * 20000, [1] * 20000]))
    spans = build_spans(corpus, np.arange(2), sequence_length=19, short_share=0.25, seed=3)
    short = spans.target[spans.target < 16]
    # An even draw of 2..16 hits 16, the full length, once in 15.
    share = 0.25 * 14 / 15
    assert abs(len(short) - share * len(spans)) < 5 * np.sqrt(share * len(spans))
    assert (spans.target.min(), spans.target.max()) == (2, 16)
    assert set(short.tolist()) == set(range(2, 16))


@pytest.mark.parametrize("shape", [[[3]] * 1000, [[3, 4]] + [[3]] * 10])
def test_fewer_than_two_documents_of_two_sentences_are_refused_within_a_second(write_corpus, shape):
    corpus = write_corpus(numbered_documents(shape))
    started = time.monotonic()
    told = rf"of the {len(shape)} documents of this part {len(shape[0]) - 1} have two sentences.*blank lines"
    with pytest.raises(DataError, match=told):
        build_spans(corpus, np.arange(len(shape)), sequence_length=64, short_share=0.1, seed=1)
    assert time.monotonic() - started < 1


def test_spans_of_a_hundred_thousand_sentences_take_less_than_a_second(tmp_path):
    draws = np.random.default_rng(0)
    starts = np.concatenate([[0], np.cumsum(draws.integers(4, 40, size=100_000))])
    tokens = np.zeros(starts[-1], dtype=np.uint16)
    corpus = Corpus(tmp_path, tokens, starts, np.arange(0, 100_001, 20), facts=None)
    started = time.monotonic()
    spans = build_spans(corpus, np.arange(5000), sequence_length=64, short_share=0.1, seed=1)
    assert time.monotonic() - started < 1
    assert len(spans) > 25_000
