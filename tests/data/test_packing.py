"""Microbatches out of lengths: bins that hold, and replicas that share the work."""

import itertools

import numpy as np
import pytest

from megatron_bert_tp.data.packing import (
    Cutting,
    deal,
    emptiest_first,
    even_bins,
    first_fit_decreasing,
    like_lengths,
    rounded,
)


def random_lengths(count: int, longest: int = 128, seed: int = 0) -> np.ndarray:
    """Mostly full samples and some short ones, as pretraining has them."""
    draws = np.random.default_rng(seed)
    return np.where(draws.random(count) < 0.6, longest, draws.integers(5, longest, count))


def all_microbatches(lengths: np.ndarray, packing: str, size: int, data_size: int) -> list[list[np.ndarray]]:
    return [
        Cutting(packing=packing, size=size, data_rank=rank, data_size=data_size).cut(lengths)
        for rank in range(data_size)
    ]


def slow_first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The textbook's loop."""
    bins: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        for members in bins:
            if sum(lengths[m] for m in members) + lengths[place] <= capacity:
                members.append(place)
                break
        else:
            bins.append([place])
    return [sorted(members) for members in bins]


def fewest_bins(lengths: list[int], capacity: int) -> int:
    """By trying every way to put samples into bins."""
    for count in itertools.count(1):
        for bin_of in itertools.product(range(count), repeat=len(lengths)):
            held = np.bincount(bin_of, weights=lengths, minlength=count)
            if held.max() <= capacity:
                return count
    raise AssertionError


@pytest.mark.parametrize("seed", range(20))
def test_first_fit_decreasing_is_that_of_the_textbook(seed):
    lengths = random_lengths(60, seed=seed)
    found = first_fit_decreasing(lengths, 300)
    assert [members.tolist() for members in found] == slow_first_fit(lengths.tolist(), 300)


@pytest.mark.parametrize("seed", range(10))
def test_bins_are_nearly_as_few_as_can_be(seed):
    lengths = np.random.default_rng(seed).integers(10, 60, 7)
    found = first_fit_decreasing(lengths, 100)
    assert len(found) <= 11 / 9 * fewest_bins(lengths.tolist(), 100) + 6 / 9  # Dosa 2007


@pytest.mark.parametrize("packing", ["none", "bins", "packed"])
@pytest.mark.parametrize("data_size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_every_sample_is_in_one_microbatch_and_replicas_have_equally_many(packing, data_size, count):
    lengths = random_lengths(count)
    size = 3 if packing == "none" else 400
    hands = all_microbatches(lengths, packing, size, data_size)
    assert len({len(hand) for hand in hands}) == 1
    dealt = [microbatch for hand in hands for microbatch in hand]
    assert sorted(np.concatenate(dealt).tolist()) == list(range(count))
    for microbatch in dealt:
        own = lengths[microbatch]
        held = {"none": len(own), "packed": rounded(own.sum()), "bins": len(own) * rounded(own.max(initial=0))}
        assert held[packing] <= size


def test_without_packing_microbatches_keep_their_contents_whatever_the_replicas():
    alone = all_microbatches(random_lengths(36), "none", 3, 1)[0]
    assert np.concatenate(alone).tolist() == list(range(36))
    for size in (2, 3):
        hands = all_microbatches(random_lengths(36), "none", 3, size)
        together = [microbatch for at_once in zip(*hands, strict=True) for microbatch in at_once]
        assert [m.tolist() for m in together] == [m.tolist() for m in alone]


@pytest.mark.parametrize("data_size", [1, 2, 4, 8])
@pytest.mark.parametrize("packing", ["bins", "packed"])
def test_replicas_compute_about_equally_many_tokens(packing, data_size):
    for seed in range(20):
        lengths = random_lengths(512, seed=seed)
        hands = all_microbatches(lengths, packing, 1024, data_size)
        work = {"packed": np.sum, "bins": lambda own: len(own) * rounded(own.max(initial=0))}[packing]
        held = [sum(int(work(lengths[m])) for m in hand) for hand in hands]
        # Bins of like lengths cannot be cut finer than 1024.  Packed ones differ by less than a sample where they
        # are filled evenly; where they are filled to the brim, by less than two.
        assert max(held) - min(held) <= {"packed": 256, "bins": 1024}[packing]


def test_packed_bins_are_filled_evenly_where_that_fits():
    lengths = random_lengths(1000)
    bins = even_bins(lengths, 1024, 4)
    held = [int(lengths[members].sum()) for members in bins]
    assert len(bins) % 4 == 0
    assert len(bins) <= -(-int(lengths.sum()) // 1024) + 4
    assert max(held) - min(held) < 128
    # Seven samples of 4 fill bins of 10 to 8, 8, 8 and 4; six of 5 fill three to the brim.
    assert sorted(len(members) for members in even_bins(np.full(7, 4), 10, 1)) == [1, 2, 2, 2]
    assert [len(members) for members in even_bins(np.full(6, 5), 10, 1)] == [2, 2, 2]


def test_packed_bins_stay_full_where_even_ones_would_overflow():
    lengths = np.array([6, 6, 4, 4, 4])
    assert [int(lengths[members].sum()) for members in emptiest_first(lengths, 2)] == [14, 10]
    assert [lengths[members].tolist() for members in even_bins(lengths, 12, 1)] == [[6, 6], [4, 4, 4]]


def test_bins_of_like_lengths_hold_the_padding_that_widths_need():
    """Rows of 97 are 104 wide: three of them fit into 400, not four."""
    assert [len(members) for members in like_lengths(np.full(7, 97), 400)] == [3, 3, 1]


def test_bins_of_like_lengths_waste_less_than_samples_in_order():
    lengths = np.random.default_rng(0).integers(5, 129, 512)
    padded = [len(m) * rounded(int(lengths[m].max())) for m in like_lengths(lengths, 1024)]
    in_order = sum(8 * rounded(int(part.max())) for part in lengths.reshape(-1, 8))
    assert sum(padded) < 1.1 * lengths.sum() < 0.7 * in_order


def test_dealing_gives_equal_numbers_and_like_costs():
    assert deal([5, 1, 4, 3, 3, 2], 2) == [[0, 4, 1], [2, 3, 5]]
    assert deal([7, 1, 1], 2) == [[0, -1], [1, 2]]
    assert deal([3], 3) == [[0], [-1], [-1]]
