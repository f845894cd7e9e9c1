"""The growing global batch against numbers worked out by hand, and samples against a loop over steps."""

from itertools import pairwise

import pytest

from megatron_bert_tp.optim.batch_size import BatchRamp, BatchSize

RAMP = BatchSize(32, BatchRamp(start=8, increment=8, samples=90))


def test_without_a_ramp_the_batch_is_constant():
    assert {BatchSize(32).global_batch_at(done) for done in (0, 1, 10**12)} == {32}
    assert BatchSize(32).samples_after(1000) == 32_000
    assert BatchSize(32).samples_after(3, samples_done=5) == 101


@pytest.mark.parametrize(
    ("done", "batch"),
    # Three increments within 90 samples: one every 30.
    [(0, 8), (29, 8), (30, 16), (59, 16), (60, 24), (89, 24), (90, 32), (91, 32), (10**9, 32)],
)
def test_the_batch_grows_at_equal_distances(done, batch):
    assert RAMP.global_batch_at(done) == batch


def test_samples_after_steps_are_the_sum_of_batches():
    # 4 x 8 = 32; 2 x 16 -> 64; 2 x 24 -> 112; then 32 each.
    assert [RAMP.samples_after(steps) for steps in range(11)] == [0, 8, 16, 24, 32, 48, 64, 88, 112, 144, 176]
    assert RAMP.samples_after(2, samples_done=64) == 112


@pytest.mark.parametrize(
    "size",
    [
        RAMP,
        BatchSize(40, BatchRamp(start=16, increment=24, samples=7)),
        BatchSize(64, BatchRamp(start=1, increment=1, samples=1000)),
        BatchSize(1024, BatchRamp(start=32, increment=32, samples=100)),
        BatchSize(9, BatchRamp(start=3, increment=2, samples=1)),
        BatchSize(5, BatchRamp(start=4, increment=1, samples=10**6)),
    ],
    ids=str,
)
@pytest.mark.parametrize("begun", [0, 13])
def test_samples_after_steps_equal_a_loop(size, begun):
    done = begun
    for steps in range(300):
        assert size.samples_after(steps, samples_done=begun) == done
        done += size.global_batch_at(done)


def test_a_boundary_that_floats_would_miss_is_exact():
    """Level k begins where k / increments of the ramp's samples are done, compared in integers."""
    increments, samples = 49, 10**15 + 7
    size = BatchSize(1 + increments, BatchRamp(start=1, increment=1, samples=samples))
    ends = [-(-level * samples // increments) for level in range(increments + 1)]
    for level, (first, beyond) in enumerate(pairwise(ends)):
        assert {size.global_batch_at(first), size.global_batch_at(beyond - 1)} == {1 + level}


def test_a_ramp_as_long_as_a_real_run_is_counted_at_once():
    size = BatchSize(1024, BatchRamp(start=32, increment=32, samples=10**12))
    assert size.samples_after(10**12) > 10**12
