import time
from itertools import pairwise

import numpy as np
import pytest

from megatron_bert_tp.data.corpus.mapped import Corpus
from megatron_bert_tp.data.samples import span_walk
from megatron_bert_tp.data.samples.span_rule import SpanRule
from megatron_bert_tp.data.samples.spans import build_spans
from megatron_bert_tp.data.samples.splits import part_of
from megatron_bert_tp.errors import DataError
from tests.data.corpora import numbered_documents, random_shape

LEAST = {"nsp": 2, "sop": 2, "none": 1}


@pytest.fixture
def corpus_of(tmp_path):
    """Function that makes a corpus in memory from sentence lengths and document boundaries."""

    def make(lengths, boundaries) -> Corpus:
        lengths, boundaries = np.asarray(lengths, dtype=np.int32), np.asarray(boundaries, dtype=np.int64)
        tokens = np.broadcast_to(np.uint16(7), int(lengths.sum(dtype=np.int64)))
        pointers = 2 * (np.cumsum(lengths, dtype=np.int64) - lengths)
        return Corpus(tmp_path / "text", tokens, lengths, pointers, boundaries)

    return make


def spans_one_by_one(corpus, documents, targets, *, least=2):
    """The walk as `build_mapping` of Megatron-LM describes it; ``targets`` by first sentence."""
    spans, lengths, boundaries = [], corpus.lengths.tolist(), corpus.documents.tolist()
    for document in documents:
        first, end = boundaries[document], boundaries[document + 1]
        if end - first < least:
            continue
        tokens = 0
        for sentence in range(first, end):
            tokens += lengths[sentence]
            remaining = end - sentence - 1
            closes = tokens >= targets[first] and remaining > 1 and sentence + 1 - first >= least
            if closes or remaining == 0:
                spans.append((first, sentence + 1, document))
                first, tokens = sentence + 1, 0
    return spans


def assert_spans_are_those_of_the_reference(corpus, documents, *, pairs="nsp", **options):
    spans = build_spans(corpus, np.array(documents), pairs=pairs, seed=7, **options)
    targets = dict(zip(spans.first.tolist(), spans.target.tolist(), strict=True))
    expected = spans_one_by_one(corpus, documents, targets, least=LEAST[pairs])
    owners = spans.documents[spans.document].tolist()
    assert list(zip(spans.first.tolist(), spans.last.tolist(), owners, strict=True)) == expected
    assert spans.target.tolist() == SpanRule(pairs=pairs, seed=7, **options).targets(spans.first).tolist()
    sizes = np.diff(corpus.documents)
    assert spans.documents.tolist() == [n for n in documents if sizes[n] >= LEAST[pairs]]


@pytest.mark.parametrize("pairs", ["nsp", "sop", "none"])
@pytest.mark.parametrize("short_share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("sequence_length", [8, 32, 128])
def test_spans_equal_the_references_walk(write_corpus, sequence_length, short_share, pairs):
    corpus = write_corpus(numbered_documents(random_shape(80)))
    for documents in (list(range(80)), list(range(0, 80, 3)), list(range(1, 40))):
        assert_spans_are_those_of_the_reference(
            corpus, documents, pairs=pairs, sequence_length=sequence_length, short_share=short_share
        )


@pytest.mark.parametrize("few", [0, 3, 1000])
@pytest.mark.parametrize("block", [1, 40, 1000])
@pytest.mark.parametrize("pairs", ["sop", "none"])
def test_spans_do_not_depend_on_how_the_corpus_is_walked(corpus_of, monkeypatch, pairs, block, few):
    """Cut documents, empty ones, one after the other, at the end, and both ways to walk."""
    monkeypatch.setattr(span_walk, "_BLOCK", block)
    monkeypatch.setattr(span_walk, "_FEW", few)
    draws = np.random.default_rng(block + few)
    for last in (0, 1, 2, 150):
        sizes = [*draws.integers(0, 6, 60), 200, 0, 3, 301, 500, 0, 1, *draws.integers(0, 60, 20), last]
        corpus = corpus_of(draws.integers(1, 20, sum(sizes)), np.cumsum([0, *sizes]))
        for documents in (list(range(len(sizes))), list(range(0, len(sizes), 2)), [61, 64]):
            for short_share in (0.0, 0.4):
                assert_spans_are_those_of_the_reference(
                    corpus, documents, pairs=pairs, sequence_length=16, short_share=short_share
                )


def test_spans_of_a_large_corpus_equal_the_references_walk(corpus_of):
    """Documents of all sizes, two of them longer than what is walked at a time."""
    draws = np.random.default_rng(0)
    sizes = [*draws.geometric(0.05, 20_000), 300_000, *draws.integers(0, 3, 3000), 2000, 2000, 270_000, 5]
    corpus = corpus_of(draws.integers(5, 46, sum(sizes)), np.cumsum([0, *sizes]))
    documents = part_of(len(sizes), (90.0, 10.0, 0.0), "training").documents().tolist()
    assert max(sizes) > 300_000 - 1 > span_walk._BLOCK
    assert_spans_are_those_of_the_reference(
        corpus, sorted({*documents, 20_000, len(sizes) - 2}), sequence_length=128, short_share=0.1
    )


def test_a_part_and_the_list_of_its_documents_have_the_same_spans(write_corpus):
    corpus = write_corpus(numbered_documents(random_shape(60)))
    part = part_of(60, (60.0, 40.0, 0.0), "validation")
    options = {"sequence_length": 32, "short_share": 0.1, "seed": 7}
    one, other = build_spans(corpus, part, **options), build_spans(corpus, part.documents(), **options)
    assert one.first.tolist() == other.first.tolist()
    assert one.documents.tolist() == other.documents.tolist()


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
    part = build_spans(corpus, np.array([28, 4, 5]), **options)
    kept = np.isin(whole.document, [4, 5, 28])
    for name in ("first", "last", "target"):
        assert getattr(part, name).tolist() == getattr(whole, name)[kept].tolist()


@pytest.mark.parametrize(("pairs", "longest"), [("nsp", 16), ("sop", 16), ("none", 17)])
def test_targets_are_short_for_their_share_and_within_bounds(corpus_of, pairs, longest):
    """5 sigma of a binomial.  19 tokens, of which [CLS] and one or two [SEP] are no text."""
    corpus = corpus_of([1] * 40000, [0, 20000, 40000])
    spans = build_spans(corpus, np.arange(2), sequence_length=19, short_share=0.25, seed=3, pairs=pairs)
    short = spans.target[spans.target < longest]
    # An even draw of 2..16 hits 16, the full length, once in 15.
    share = 0.25 * (longest - 2) / (longest - 1)
    assert abs(len(short) - share * len(spans)) < 5 * np.sqrt(share * len(spans))
    assert (spans.target.min(), spans.target.max()) == (2, longest)
    assert set(short.tolist()) == set(range(2, longest))


def test_short_targets_are_even_up_to_the_full_length(corpus_of):
    """5 sigma of a binomial for each of 2..16."""
    corpus = corpus_of([1] * 200_000, [0, 100_000, 200_000])
    spans = build_spans(corpus, np.arange(2), sequence_length=19, short_share=1.0, seed=3)
    counts = np.bincount(spans.target, minlength=17)
    assert counts[:2].tolist() == [0, 0]
    assert np.abs(counts[2:] - len(spans) / 15).max() < 5 * np.sqrt(len(spans) / 15)


def test_targets_depend_on_the_seed(corpus_of):
    corpus = corpus_of([1] * 2000, [0, 1000, 2000])
    one, other = (
        build_spans(corpus, np.arange(2), sequence_length=19, short_share=0.5, seed=seed) for seed in (1, 2)
    )
    assert one.target.tolist()[:100] != other.target.tolist()[:100]


def test_without_pairs_one_sentence_is_a_sample(corpus_of):
    corpus = corpus_of([4] * 1000, np.arange(1001))
    spans = build_spans(corpus, np.arange(1000), sequence_length=64, short_share=0.1, seed=1, pairs="none")
    assert list(zip(spans.first.tolist(), spans.last.tolist(), strict=True)) == list(pairwise(range(1001)))


@pytest.mark.parametrize("num_documents", [1000, 3_000_000])
@pytest.mark.parametrize("pairs", ["nsp", "sop"])
def test_documents_of_one_sentence_are_refused_within_a_second(corpus_of, num_documents, pairs):
    corpus = corpus_of([3] * num_documents, np.arange(num_documents + 1))
    part = part_of(num_documents, (96.0, 4.0, 0.0), "training")
    started = time.process_time()
    told = (
        rf"objective.pairs={pairs} needs .* documents of 2 or more sentences, but of the {len(part)} documents of "
        rf"this part 0 have so many \(the corpus has {num_documents} documents, {num_documents} sentences.*"
        r"blank lines.*objective.pairs=.*none.*data.split"
    )
    with pytest.raises(DataError, match=told):
        build_spans(corpus, part, sequence_length=64, short_share=0.1, seed=1, pairs=pairs)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(("pairs", "is_enough"), [("nsp", False), ("sop", True), ("none", True)])
def test_one_document_of_two_sentences_is_enough_for_all_but_nsp(corpus_of, pairs, is_enough):
    corpus = corpus_of([3] * 12, [0, 2, *range(3, 13)])
    options = {"sequence_length": 64, "short_share": 0.1, "seed": 1, "pairs": pairs}
    if is_enough:
        assert len(build_spans(corpus, np.arange(11), **options)) == (11 if pairs == "none" else 1)
        return
    with pytest.raises(DataError, match="of the 11 documents of this part 1 have so many"):
        build_spans(corpus, np.arange(11), **options)


def test_a_part_without_documents_is_refused(corpus_of):
    corpus = corpus_of([3] * 12, [0, 6, 12])
    with pytest.raises(DataError, match=r"of the 0 documents of this part 0 have so many.*change data.split"):
        build_spans(
            corpus, part_of(2, (1.0, 0.0, 0.0), "test"), sequence_length=64, short_share=0, seed=1, pairs="none"
        )


@pytest.mark.parametrize("sentences_of_document", [20, 1000, 400_000])
def test_spans_of_a_million_sentences_take_a_moment(corpus_of, sentences_of_document):
    """About 0.1 s is measured; the bound leaves room for a busy machine."""
    draws = np.random.default_rng(0)
    lengths = draws.integers(4, 40, size=1_200_000)
    corpus = corpus_of(lengths, np.arange(0, 1_200_001, sentences_of_document))
    started = time.process_time()
    spans = build_spans(
        corpus, np.arange(corpus.num_documents), sequence_length=128, short_share=0.1, seed=1, pairs="sop"
    )
    assert time.process_time() - started < 3
    assert len(spans) > 150_000
