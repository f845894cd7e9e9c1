import numpy as np
import pytest

from megatron_bert_tp.data.samples.blend import blend_weights, places_in_blend, samples_of_corpora
from megatron_bert_tp.errors import DataError

WEIGHTS = [[1], [1, 1], [3, 1], [1, 1000], [7, 2, 5], [1, 1, 1, 1, 1], [524288, 1, 262144, 262143]]


def counts_one_by_one(number: int, weights: list[int]) -> list[int]:
    """Samples of each corpus before ``number``, in Python's whole numbers."""
    before = [number]
    for k in range(len(weights) - 1, 0, -1):
        before.insert(0, before[0] * sum(weights[:k]) // sum(weights[: k + 1]))
    return [high - low for low, high in zip([0, *before], before, strict=False)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_each_sample_is_the_next_one_of_exactly_one_corpus(weights):
    corpus, own = places_in_blend(np.arange(6000), np.array(weights))
    for k in range(len(weights)):
        assert own[corpus == k].tolist() == list(range(np.sum(corpus == k)))
    assert set(corpus.tolist()) <= set(range(len(weights)))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_shares_are_right_after_any_number_of_samples(weights):
    """Less than one sample for each corpus, at every one of 6000 numbers."""
    corpus, _ = places_in_blend(np.arange(6000), np.array(weights))
    taken = np.cumsum(corpus[:, None] == np.arange(len(weights)), axis=0)
    exact = np.arange(1, 6001)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(taken - exact).max() < max(len(weights), 2)


@pytest.mark.parametrize("weights", [*WEIGHTS, [2**30, 2**30 - 1], [2**31 - 3, 1, 1]])
@pytest.mark.parametrize("first", [0, 1 << 20, (1 << 40) - 50, (1 << 62) + 12345])
def test_places_are_exact_for_every_number(weights, first):
    numbers = np.arange(first, first + 100)
    corpus, own = places_in_blend(numbers, np.array(weights))
    for number, k, place in zip(numbers.tolist(), corpus.tolist(), own.tolist(), strict=True):
        before, after = counts_one_by_one(number, weights), counts_one_by_one(number + 1, weights)
        assert [b - a for a, b in zip(before, after, strict=True)] == [int(n == k) for n in range(len(weights))]
        assert place == before[k]
    assert samples_of_corpora(first, np.array(weights)).tolist() == counts_one_by_one(first, weights)


def test_places_depend_on_the_number_alone():
    weights = np.array([5, 3, 2])
    corpus, own = places_in_blend(np.arange(1000), weights)
    some = np.random.default_rng(0).permutation(1000)[:100]
    assert [each.tolist() for each in places_in_blend(some, weights)] == [
        corpus[some].tolist(),
        own[some].tolist(),
    ]


def test_without_weights_an_epoch_of_the_blend_is_one_of_each_corpus():
    spans = [1234, 7, 99_999]
    weights = blend_weights(None, spans)
    assert samples_of_corpora(sum(spans), weights).tolist() == spans
    assert samples_of_corpora(3 * sum(spans), weights).tolist() == [3 * each for each in spans]


@pytest.mark.parametrize("shares", [(0.7, 0.3), (70, 30), (1e-3, 1.0), (1 / 3, 2 / 3)])
def test_weights_are_in_proportion(shares):
    weights = blend_weights(shares, [5, 50_000])
    assert np.abs(weights / weights.sum() - np.array(shares) / sum(shares)).max() < 1e-6


def test_spans_of_a_giant_blend_are_scaled():
    weights = blend_weights(None, [3 << 40, 1 << 40])
    assert (weights / weights.sum()).tolist() == [0.75, 0.25]


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ((1.0, 0.0), r"data.weights \(1.0, 0.0\): each share must be above 0"),
        ((1.0, -1.0), "must be above 0"),
        ((1.0, 1e-9), "at least one in 2097152 of their sum"),
        ((1.0, float("nan")), "must be above 0"),
        ((1.0, float("inf")), "must be above 0"),
        ((1.0,), "has 1 shares for the 2 corpora"),
        ((1.0, 1.0, 1.0), "has 3 shares for the 2 corpora"),
    ],
)
def test_weights_that_cannot_be_kept_are_refused(shares, told):
    with pytest.raises(DataError, match=told):
        blend_weights(shares, [10, 10])
