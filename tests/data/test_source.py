import pickle
from dataclasses import fields

import numpy as np
import pytest

from megatron_bert_tp.data.corpus.mapped import Corpus
from megatron_bert_tp.data.samples.blend import places_in_blend
from megatron_bert_tp.data.samples.pairs import choose_pairs, lay_out
from megatron_bert_tp.data.samples.sampler import SampleOrder
from megatron_bert_tp.data.samples.source import SampleSource, SourceSettings
from megatron_bert_tp.data.samples.spans import build_spans
from megatron_bert_tp.data.samples.splits import part_of
from megatron_bert_tp.errors import DataError
from tests.data.corpora import numbered_documents, numbered_vocabulary, random_shape
from tests.data.index_files import index_bytes

SPLIT = (75.0, 25.0, 0.0)


@pytest.fixture(scope="module")
def vocabulary():
    return numbered_vocabulary()


@pytest.fixture
def corpora(write_corpus):
    """Three corpora of 40, 80 and 20 documents."""
    shapes = [random_shape(count, seed, sentences=(2, 20)) for seed, count in enumerate((40, 80, 20))]
    return [write_corpus(numbered_documents(shape), f"corpus{n}") for n, shape in enumerate(shapes)]


def open_source(corpora, part="training", say=print, **changes):
    values = {"split": SPLIT, "sequence_length": 64, "short_share": 0.1, "pairs": "nsp", "seed": 11}
    return SampleSource.open(corpora, part=part, settings=SourceSettings(**{**values, **changes}), say=say)


def spans_of(corpus, part="training", pairs="nsp"):
    documents = part_of(corpus.num_documents, SPLIT, part)
    return build_spans(corpus, documents, sequence_length=64, short_share=0.1, seed=11, pairs=pairs)


def assert_equal(one, other):
    for field in fields(one):
        assert getattr(one, field.name).tolist() == getattr(other, field.name).tolist(), field.name


@pytest.mark.parametrize("pairs", ["nsp", "sop", "none"])
def test_one_corpus_gives_its_spans_in_their_order(corpora, vocabulary, pairs):
    source, spans, numbers = (
        open_source(corpora[:1], pairs=pairs),
        spans_of(corpora[0], pairs=pairs),
        np.arange(300),
    )
    chosen = SampleOrder(len(spans), seed=11).spans(numbers)
    expected = choose_pairs(corpora[0], spans, chosen, seed=11, numbers=numbers, task=pairs)
    assert_equal(source.pairs(numbers), expected)
    laid_out = lay_out(corpora[0].tokens, expected, vocabulary, width=64)
    assert_equal(source.rows(source.pairs(numbers), vocabulary, width=64), laid_out)
    assert source.num_samples_per_epoch == len(spans)


@pytest.mark.parametrize("weights", [None, (0.5, 0.3, 0.2)])
@pytest.mark.parametrize("pairs", ["nsp", "sop", "none"])
def test_a_blend_gives_each_number_from_its_corpus(corpora, vocabulary, weights, pairs):
    """Each sample alone, from the corpus that the closed form names, drawn by its number in the blend."""
    source = open_source(corpora, weights=weights, pairs=pairs)
    numbers = np.random.default_rng(0).permutation(3000)[:200]
    together = source.pairs(numbers)
    rows = source.rows(together, vocabulary, width=64)
    spans = [spans_of(corpus, pairs=pairs) for corpus in corpora]
    scaled = np.array([len(each) for each in spans]) if weights is None else np.array([524288, 314573, 209715])
    for row, number in enumerate(numbers[:, None]):
        corpus, own = (int(each[0]) for each in places_in_blend(number, scaled))
        chosen = SampleOrder(len(spans[corpus]), seed=11, corpus=corpus).spans(np.array([own]))
        alone = choose_pairs(corpora[corpus], spans[corpus], chosen, seed=11, numbers=number, task=pairs)
        assert together.corpus[row] == corpus
        for name in ("first_a", "length_a", "first_b", "length_b", "labels"):
            assert getattr(together, name)[row] == getattr(alone, name)[0]
        laid_out = lay_out(corpora[corpus].tokens, alone, vocabulary, width=64)
        for field in fields(rows):
            assert getattr(rows, field.name)[row].tolist() == getattr(laid_out, field.name)[0].tolist()
    assert set(together.corpus.tolist()) == {0, 1, 2}


def test_samples_do_not_depend_on_the_batch_that_they_are_in(corpora):
    source = open_source(corpora, weights=(0.5, 0.3, 0.2))
    whole = source.pairs(np.arange(100))
    for size in (1, 7, 32):
        for first in range(0, 100, size):
            numbers = np.arange(first, min(first + size, 100))
            assert_equal(source.pairs(numbers), whole.take(numbers))


def test_an_epoch_without_weights_visits_every_span_of_every_corpus_once(corpora):
    source = open_source(corpora, pairs="none")
    pairs = source.pairs(np.arange(source.num_samples_per_epoch))
    for number, corpus in enumerate(corpora):
        spans = spans_of(corpus, pairs="none")
        ends = np.sort(pairs.first_a[pairs.corpus == number])
        starts = corpus.starts_of(spans.first)
        assert len(ends) == len(starts)
        # A sample that was too long begins later, but before the next.
        assert (ends >= starts).all()
        assert (ends[:-1] < starts[1:]).all()


def test_every_token_is_from_a_document_of_the_part(corpora):
    parts = {part: open_source(corpora, part, weights=(1.0, 1.0, 1.0)) for part in ("training", "validation")}
    for part, source in parts.items():
        pairs = source.pairs(np.arange(3000))
        for number, corpus in enumerate(corpora):
            mine = pairs.take(np.flatnonzero(pairs.corpus == number))
            ends = np.concatenate([mine.first_a, mine.first_a + mine.length_a - 1, mine.first_b])
            documents = {corpus.document_of(corpus.sentence_at(token)) for token in np.unique(ends).tolist()}
            assert documents <= set(source.documents(number).tolist())
            assert len(documents) > len(source.documents(number)) / 2, part


def test_epochs_of_each_corpus_are_told(corpora):
    source = open_source(corpora, weights=(0.5, 0.3, 0.2))
    told = source.epochs(1000)
    taken = np.bincount(source.pairs(np.arange(1000)).corpus, minlength=3)
    for row, corpus, samples in zip(told, corpora, taken.tolist(), strict=True):
        num_spans = len(spans_of(corpus))
        assert (row.prefix, row.samples, row.samples_per_epoch) == (corpus.prefix, samples, num_spans)
        assert row.epochs == samples / num_spans
    assert sum(row.samples for row in told) == 1000
    assert [row.epochs for row in open_source(corpora).epochs(2 * source.num_samples_per_epoch)] == [2.0] * 3


def test_a_source_in_another_process_maps_the_same_files(corpora):
    source = open_source(corpora, weights=(0.5, 0.3, 0.2))
    pickled = pickle.dumps(source)
    assert len(pickled) < 5000
    again = pickle.loads(pickled)
    assert_equal(again.pairs(np.arange(200)), source.pairs(np.arange(200)))
    assert again.documents(1).tolist() == source.documents(1).tolist()


def test_the_index_of_each_corpus_is_told_and_kept(corpora, tmp_path):
    said = []
    open_source(corpora, index_cache=tmp_path / "indexes", say=said.append)
    assert sum("is built in" in line for line in said) == 3
    assert len([path for path in (tmp_path / "indexes").iterdir() if path.is_dir()]) == 3
    said.clear()
    open_source(corpora, index_cache=tmp_path / "indexes", say=said.append)
    assert said == []


def test_a_corpus_of_the_blend_without_samples_is_named(corpora, write_corpus):
    poor = write_corpus(numbered_documents([[3]] * 50), "poor")
    with pytest.raises(DataError, match=rf"{poor.prefix}: objective.pairs=nsp needs"):
        open_source([*corpora, poor])


def test_as_many_weights_as_corpora_are_asked_for(corpora):
    with pytest.raises(DataError, match=r"data.weights has 2 shares for the 3 corpora"):
        open_source(corpora, weights=(0.5, 0.5))


def test_an_index_of_another_corpus_is_refused(tmp_path, write_corpus):
    corpus = write_corpus(numbered_documents([[4, 4, 4]] * 40))
    open_source([corpus])
    boundaries = [0, 2, *range(6, 121, 3)]
    (tmp_path / "corpus.idx").write_bytes(index_bytes([4] * 120, boundaries))
    with pytest.raises(DataError, match=r"corpus\.idx: belongs to another corpus"):
        open_source([Corpus.open(tmp_path / "corpus")])
