import numpy as np
import pytest

from megatron_bert_tp.data.draws import Purpose, draw, streams
from megatron_bert_tp.data.samples.shuffle import permuted


def keys(count: int, seed: int = 7) -> np.ndarray:
    return draw(streams(seed, Purpose.ORDER, np.zeros(1, dtype=np.int64)), np.arange(count))


def deviation(counts: np.ndarray) -> float:
    """Standard deviations by which the chi-square of even counts is above its mean."""
    expected, freedom = counts.mean(), counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9, 10, 97, 256, 1000, 1023, 1024, 1025, 65536, 99991])
def test_every_number_comes_once(size):
    for key in keys(4):
        moved = permuted(np.arange(size), size, key[None])
        assert np.sort(moved).tolist() == list(range(size))


def test_numbers_have_the_permutation_of_their_own_key():
    numbers, each = np.arange(3000) % 1000, np.repeat(keys(3), 1000)
    together = permuted(numbers, 1000, each)
    apart = [permuted(np.arange(1000), 1000, key[None]) for key in keys(3)]
    assert together.tolist() == np.concatenate(apart).tolist()
    assert len({tuple(one) for one in apart}) == 3


@pytest.mark.parametrize("size", [2, 3, 5, 6, 7, 12, 31, 64])
def test_two_places_take_every_pair_of_numbers_equally_often(size):
    """Over 100,000 keys; 6 standard deviations, since a chi-square of few cells has a heavy right side."""
    many = keys(100_000)
    for one, other in ((0, 1), (0, size - 1)):
        first = permuted(np.full(len(many), one), size, many)
        second = permuted(np.full(len(many), other), size, many)
        pairs = np.bincount(first * size + second, minlength=size * size).reshape(size, size)
        assert np.trace(pairs) == 0
        assert deviation(pairs[~np.eye(size, dtype=bool)]) < 6 if size > 2 else abs(pairs[0, 1] - 50_000) < 800


@pytest.mark.parametrize("size", [1024, 5000, 1_000_003])
def test_large_permutations_are_even_in_place_distance_and_neighbourhood(size):
    """Cells of 1/16 of the numbers, over 64 keys; 6 standard deviations."""
    moved = np.stack([permuted(np.arange(min(size, 2000)), size, key[None]) for key in keys(64)])
    cell = moved * 16 // size
    assert deviation(np.bincount(cell.ravel(), minlength=16)) < 6
    for shift in (1, 2, 32):
        pairs = cell[:, :-shift] * 16 + cell[:, shift:]
        assert deviation(np.bincount(pairs.ravel(), minlength=256)) < 6
    between_keys = cell[:-1] * 16 + cell[1:]
    assert deviation(np.bincount(between_keys.ravel(), minlength=256)) < 6


def test_about_one_number_in_a_permutation_stays_where_it_is():
    """Poisson with mean 1: over 400 permutations 400 with standard deviation 20; 5 sigma."""
    stay = [np.sum(permuted(np.arange(2000), 2000, key[None]) == np.arange(2000)) for key in keys(400)]
    assert abs(sum(stay) - 400) < 100
    assert max(stay) < 10


def test_places_beyond_32_bits_are_reached():
    size = 10**12
    moved = permuted(np.arange(10_000), size, keys(1))
    assert len(set(moved.tolist())) == 10_000
    assert deviation(np.bincount(moved * 16 // size, minlength=16)) < 6
