"""The three pair tasks, against samples that are drawn one by one as docs/samples.md says."""

import numpy as np
import pytest

from megatron_bert_tp.data.draws import Purpose, draw, streams
from megatron_bert_tp.data.samples.pairs import NO_LABEL, Pairs, _first_boundary, choose_pairs, lay_out, truncate
from megatron_bert_tp.data.samples.spans import build_spans
from megatron_bert_tp.parallel.cross_entropy import IGNORED
from tests.data.corpora import FIRST, numbered_documents, numbered_vocabulary, random_shape

SEED = 77
TASKS = ("nsp", "sop", "none")


@pytest.fixture
def corpus(write_corpus):
    return write_corpus(numbered_documents(random_shape(60, seed=4, sentences=(2, 30))))


def spans_of(corpus, task, *, sequence_length=64):
    documents = np.arange(corpus.num_documents)
    return build_spans(corpus, documents, sequence_length=sequence_length, short_share=0.3, seed=1, pairs=task)


def choose(corpus, spans, numbers, task):
    return choose_pairs(corpus, spans, numbers % len(spans), seed=SEED, numbers=numbers, task=task)


def bits_of(purpose, number, count):
    drawn = draw(streams(SEED, purpose, np.array([number])), np.arange(count))
    return [int(bits) for bits in drawn]


def one_by_one(corpus, spans, number, task):
    """A and B of one sample as lists of tokens of the corpus, and the label."""
    starts = corpus.starts_of(np.arange(corpus.num_sentences + 1)).tolist()
    bounds = corpus.documents.tolist()
    span = number % len(spans)
    first, last, target = (int(column[span]) for column in (spans.first, spans.last, spans.target))
    coin, pivot_bits, document_bits, sentence_bits = (bits_of(Purpose.PAIR, number, 4)[n] for n in (1, 0, 2, 3))
    if task == "none":
        a, b, label = list(range(starts[first], starts[last])), [], -100
    else:
        pivot = first + 1 + ((pivot_bits >> 32) * (last - first - 1) >> 32)
        a = list(range(starts[first], starts[pivot]))
        b = list(range(starts[pivot], starts[last]))
        label = coin >> 63
    if task == "sop" and label:
        a, b = b, a
    if task == "nsp" and label:
        others = [n for n in spans.documents.tolist() if n != spans.documents[spans.document[span]]]
        document = others[(document_bits >> 32) * len(others) >> 32]
        sentences = list(range(bounds[document], bounds[document + 1]))
        b = []
        for sentence in sentences[(sentence_bits >> 32) * len(sentences) >> 32 :]:
            if b and len(b) >= target - len(a):
                break
            b += range(starts[sentence], starts[sentence + 1])
    words = bits_of(Purpose.TRUNCATION, number, 40)
    coins = iter([word >> place & 1 for word in words for place in range(64)])
    num_a, num_b = 0, 0
    while len(a) - num_a + len(b) - num_b > target:
        if len(a) - num_a > len(b) - num_b:
            num_a += 1
        else:
            num_b += 1
    for half, num_cut in ((a, num_a), (b, num_b)):
        for _ in range(num_cut):
            half.pop(0 if next(coins) else -1)
    return a, b, label


@pytest.mark.parametrize("task", TASKS)
def test_pairs_are_those_drawn_one_by_one(corpus, task):
    spans = spans_of(corpus, task)
    numbers = np.arange(600)
    pairs = choose(corpus, spans, numbers, task)
    for number in numbers.tolist():
        a, b, label = one_by_one(corpus, spans, number, task)
        found = [int(column[number]) for column in (pairs.first_a, pairs.length_a, pairs.length_b, pairs.labels)]
        assert found == [a[0], len(a), len(b), label]
        assert not b or pairs.first_b[number] == b[0]


def test_with_two_documents_the_random_b_is_from_the_other(write_corpus):
    corpus = write_corpus(numbered_documents([[3, 4, 5, 6]] * 2))
    spans = spans_of(corpus, "nsp", sequence_length=16)
    pairs = choose(corpus, spans, np.arange(400), "nsp")
    is_random = pairs.labels == 1
    assert 150 < is_random.sum() < 250
    assert (((pairs.first_a < 18) == (pairs.first_b < 18)) == ~is_random).all()


def test_after_a_swap_a_tie_still_takes_from_the_second_half_of_the_row(write_corpus):
    """Two sentences of 10 tokens and a target of 15: 8 stay of whatever stands first."""
    corpus = write_corpus(numbered_documents([[10, 10]] * 3))
    documents = np.arange(3)
    spans = build_spans(corpus, documents, sequence_length=18, short_share=0.0, seed=1, pairs="sop")
    pairs = choose(corpus, spans, np.arange(300), "sop")
    assert (pairs.length_a == 8).all()
    assert (pairs.length_b == 7).all()
    assert ((pairs.first_a > pairs.first_b) == (pairs.labels == 1)).all()
    assert 100 < pairs.labels.sum() < 200


def test_a_single_segment_is_cls_a_sep_without_a_label(write_corpus):
    corpus = write_corpus(numbered_documents([[3], [4, 2], [30]]))
    vocabulary = numbered_vocabulary()
    spans = build_spans(corpus, np.arange(3), sequence_length=12, short_share=0.0, seed=1, pairs="none")
    pairs = choose_pairs(corpus, spans, np.arange(3), seed=SEED, numbers=np.arange(3), task="none")
    assert pairs.lengths.tolist() == [5, 8, 12]
    assert pairs.labels.tolist() == [IGNORED] * 3
    rows = lay_out(corpus.tokens, pairs, vocabulary, width=16)
    assert rows.ids[0].tolist() == [2, FIRST, FIRST + 1, FIRST + 2, 3, *[0] * 11]
    assert rows.ids[1].tolist() == [2, *range(FIRST + 3, FIRST + 9), 3, *[0] * 8]
    assert rows.is_text.sum(axis=1).tolist() == [3, 6, 10]
    assert not rows.types.any()


def test_no_label_is_what_the_losses_pass_over():
    assert NO_LABEL == IGNORED


def test_a_single_segment_loses_tokens_on_both_sides():
    """200 of 300 tokens are cut, a binomial number of them in front: 5 sigma of the mean of 4000."""
    ones = np.ones(4000, dtype=np.int64)
    pairs = Pairs(0 * ones, 300 * ones, 300 * ones, 0 * ones, NO_LABEL * ones, 0 * ones)
    cut = truncate(pairs, 100 * ones, seed=1, numbers=np.arange(4000))
    assert (cut.length_a == 100).all()
    assert (cut.length_b == 0).all()
    assert abs(cut.first_a.mean() - 100) < 5 * np.sqrt(200) / 2 / np.sqrt(4000)


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 65, 128, 5000])
def test_the_coins_of_a_cut_are_the_bits_of_its_stream(cut):
    """Beside a sample that is cut much more, which must not change how many coins are looked at."""
    lengths = np.array([10 + cut, 4000, 10 + cut])
    zeros = np.zeros(3, dtype=np.int64)
    targets = np.array([10, 7, 10])
    short = truncate(Pairs(zeros, lengths, zeros, zeros, zeros, zeros), targets, seed=SEED, numbers=np.arange(3))
    for number in (0, 2):
        words = bits_of(Purpose.TRUNCATION, number, cut // 64 + 1)
        coins = [word >> place & 1 for word in words for place in range(64)]
        assert short.first_a[number] == sum(coins[:cut])


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_does_not_depend_on_the_others_of_a_call(corpus, task):
    spans = spans_of(corpus, task)
    numbers = np.random.default_rng(0).integers(10**9, size=300)
    together = choose(corpus, spans, numbers, task)
    for size in (1, 7):
        for rows in np.array_split(np.arange(300), 300 // size):
            alone = choose(corpus, spans, numbers[rows], task)
            for name in ("first_a", "length_a", "first_b", "length_b", "labels"):
                assert getattr(alone, name).tolist() == getattr(together, name)[rows].tolist()


def test_a_span_of_one_sentence_is_no_pair(corpus):
    spans = spans_of(corpus, "none", sequence_length=8)
    assert (spans.last - spans.first == 1).any()
    with pytest.raises(AssertionError, match="one sentence"):
        choose(corpus, spans, np.arange(len(spans)), "nsp")


def test_the_first_boundary_at_a_place_is_found(corpus):
    """As `np.searchsorted` over all boundaries finds it, but never beyond the last allowed one."""
    draws = np.random.default_rng(0)
    starts = corpus.starts_of(np.arange(corpus.num_sentences + 1))
    low = draws.integers(0, corpus.num_sentences, 5000)
    high = draws.integers(low, corpus.num_sentences + 1)
    place = draws.integers(starts[low], starts[-1] + 50)
    expected = np.clip(np.searchsorted(starts, place), low, high)
    assert _first_boundary(corpus, place, low=low, high=high).tolist() == expected.tolist()
