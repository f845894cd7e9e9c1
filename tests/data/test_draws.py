import numpy as np

from megatron_bert_tp.data.draws import Purpose, below, draw, streams, uniform


def test_a_row_is_a_splitmix64_stream():
    """The outputs of the published generator for the states 1234567 and 0."""
    drawn = draw(np.array([1234567], dtype=np.uint64), np.arange(3))
    assert drawn.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert draw(np.zeros(1, dtype=np.uint64), np.arange(1)).tolist() == [0xE220A8397B1DCDAF]


def test_seed_purpose_and_row_each_change_the_stream():
    rows = np.arange(1000)
    seeds = (0, 1, 2**63 - 1)
    states = [streams(seed, purpose, rows) for seed in seeds for purpose in Purpose]
    assert len(np.unique(np.concatenate(states))) == len(seeds) * len(Purpose) * 1000


def test_a_row_does_not_depend_on_its_neighbours():
    rows = np.array([7, 3, 2**40, 3])
    together = streams(5, Purpose.WORD, rows)
    assert together.tolist() == [streams(5, Purpose.WORD, rows[[n]])[0] for n in range(4)]


def test_numbers_are_even():
    """Each of 10 values has 100,000 expected hits with standard deviation 300; 5 sigma."""
    bits = draw(streams(1, Purpose.PAIR, np.arange(1000))[:, None], np.arange(1000)).ravel()
    for values in (below(bits, 10), (uniform(bits) * 10).astype(np.int64)):
        counts = np.bincount(values, minlength=10)
        assert len(counts) == 10
        assert np.abs(counts - 100_000).max() < 1500


def test_limits_are_never_reached():
    bits = np.array([2**64 - 1, 0], dtype=np.uint64)
    assert below(bits, np.array([2**32, 1])).tolist() == [2**32 - 1, 0]
    assert below(bits, 7).tolist() == [6, 0]
    assert uniform(bits)[0] < 1
