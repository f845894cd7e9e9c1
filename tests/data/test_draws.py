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


def test_every_bit_is_even_and_neighbours_are_unrelated():
    """Neighbouring rows, columns and purposes: 5 sigma of 500,000 numbers, 64 bits and 3 correlations each."""
    rows, columns = np.arange(125_000)[:, None], np.arange(4)
    sigma = 1 / np.sqrt(500_000)
    before = uniform(draw(streams(7, Purpose.SPLIT, rows), columns))
    for purpose in list(Purpose)[1:]:
        bits = draw(streams(7, purpose, rows), columns)
        for place in range(64):
            assert abs((bits >> np.uint64(place) & np.uint64(1)).mean() - 0.5) < 5 * sigma / 2
        here = uniform(bits)
        for one, other in ((here[1:], here[:-1]), (here[:, 1:], here[:, :-1]), (here, before)):
            correlation = np.corrcoef(one.ravel(), other.ravel())[0, 1]
            assert abs(correlation) < 5 / np.sqrt(one.size)
        before = here


def test_numbers_of_a_million_streams_are_all_different():
    """2 million of 2^64: two alike would be a chance of one in 9 million."""
    bits = draw(streams(7, Purpose.WORD, np.arange(10**6))[:, None], np.arange(2))
    assert len(np.unique(bits)) == bits.size
