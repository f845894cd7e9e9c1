"""Slow ranks are found, and the noise of a busy machine is not taken for them."""

import numpy as np
import pytest

from megatron_bert_tp.reliability.actions import Kind
from megatron_bert_tp.reliability.stragglers import COUNTED, Speed, StepTimes, Stragglers

STEP = {Kind.DATA: 0.001, Kind.FORWARD: 0.021, Kind.BACKWARD: 0.042, Kind.OPTIMIZER: 0.003}
INTERVAL = 50


def interval(factors=(1.0,), *, kind=Kind.FORWARD, plus=0.0) -> list[float]:
    """Numbers of one rank: each factor is a step, in which ``kind`` takes ``plus`` seconds more."""
    times = StepTimes()
    for factor in factors:
        seconds = {each: factor * value for each, value in STEP.items()}
        seconds[kind] = seconds.get(kind, 0.0) + plus
        # Waiting is no slowness, however long.
        times.add({**seconds, Kind.MESSAGES: 9.0, Kind.AGREEMENT: 9.0, Kind.GRADIENTS: 9.0})
    return times.take()


def rows(*numbers, places=None) -> list[Speed]:
    places = places or [0] * len(numbers)
    return [Speed.of(rank, place, each) for rank, (place, each) in enumerate(zip(places, numbers, strict=True))]


def reports(intervals, *, places=None) -> list[list[tuple[int, Kind]]]:
    stragglers = Stragglers()
    return [
        [(found.rank, found.kind) for found in stragglers.report(rows(*each, places=places))] for each in intervals
    ]


def test_a_slow_rank_is_told_in_the_second_interval_with_its_phase():
    slow = interval(plus=0.05)
    assert reports([[interval(), slow]] * 3) == [[], [(1, Kind.FORWARD)], [(1, Kind.FORWARD)]]


def test_the_line_says_how_slow():
    stragglers = Stragglers()
    stragglers.report(rows(interval(), interval(plus=0.05), interval()))
    (found,) = stragglers.report(rows(interval(), interval(plus=0.05), interval()))
    assert found.line == "rank 1 is slow: forward takes 71 ms a step, its peers' median is 21 ms"


@pytest.mark.parametrize("kind", COUNTED)
def test_each_kind_of_own_work_is_told(kind):
    assert reports([[interval(plus=0.05, kind=kind), interval()]] * 2)[1] == [(0, kind)]


def test_a_rank_that_is_a_fifth_slower_is_found_and_one_that_is_a_tenth_slower_is_not():
    numbers = [interval(), interval((1.1,)), interval((1.2,)), interval()]
    assert reports([numbers] * 2)[1] == [(2, Kind.FORWARD), (2, Kind.BACKWARD)]


def test_what_held_in_one_interval_alone_is_not_told():
    slow, even = [interval(), interval(plus=0.05)], [interval(), interval()]
    assert reports([slow, even, slow, even]) == [[]] * 4


def test_a_rank_that_is_as_fast_as_others_in_a_third_of_its_steps_is_not_told():
    numbers = [interval([1.0] * INTERVAL), interval([9.0] * 33 + [1.0] * 17)]
    assert reports([numbers] * 3) == [[]] * 3


def test_less_than_a_millisecond_is_not_told():
    assert reports([[interval(), interval(plus=0.0009, kind=Kind.OPTIMIZER)]] * 2)[1] == []
    assert reports([[interval(), interval(plus=0.0016, kind=Kind.OPTIMIZER)]] * 2)[1] == [(1, Kind.OPTIMIZER)]


def test_stages_of_different_work_are_not_compared():
    numbers = [interval(), interval((3.0,))]
    assert reports([numbers] * 5, places=[0, 1]) == [[]] * 5


def test_a_rank_without_peers_is_compared_with_its_past():
    even, slow = [interval(), interval()], [interval(), interval(plus=0.05)]
    assert reports([even] * 3 + [slow] * 2, places=[0, 1])[3:] == [[], [(1, Kind.FORWARD)]]


def test_a_growing_batch_is_no_slowness():
    growing = [[interval((factor,))] * 2 for factor in (1, 1, 1, 2, 3, 4, 4)]
    assert reports(growing, places=[0, 1]) == [[]] * 7


def test_noise_of_a_busy_machine_is_not_told():
    """Steps of 1000 x 4 ranks: each second or so, one rank is 2 to 5 times slower for up to half an interval."""
    draws = np.random.default_rng(5)
    steps = 1000 * INTERVAL // 5
    factors = 1 + 0.03 * draws.standard_normal((4, steps)) ** 2
    for rank in range(4):
        for start in draws.integers(0, steps, steps // 100):
            factors[rank, start : start + draws.integers(1, 25)] *= draws.uniform(2, 5)
    intervals = [
        [interval(factors[rank, start : start + INTERVAL]) for rank in range(4)]
        for start in range(0, steps, INTERVAL)
    ]
    told = sum(bool(found) for found in reports(intervals))
    assert told / steps <= 1 / 1000


def test_a_slow_rank_is_found_in_the_same_noise():
    draws = np.random.default_rng(6)
    factors = 1 + 0.03 * draws.standard_normal((2, 20 * INTERVAL)) ** 2
    intervals = [
        [
            interval(factors[0, start : start + INTERVAL]),
            interval(1.25 * factors[1, start : start + INTERVAL]),
        ]
        for start in range(0, 20 * INTERVAL, INTERVAL)
    ]
    assert all((1, Kind.FORWARD) in found for found in reports(intervals)[1:])


def test_an_interval_is_told_by_median_and_lower_quartile():
    times = StepTimes()
    for seconds in (0.05, 0.01, 0.04, 0.02, 0.03):
        times.add({Kind.FORWARD: seconds})
    speed = Speed.of(3, 1, times.take())
    assert (speed.rank, speed.place) == (3, 1)
    assert (speed.usual[Kind.FORWARD], speed.fast[Kind.FORWARD]) == (0.03, 0.02)
    assert speed.usual[Kind.DATA] == 0
    assert times.take() == [0.0] * (2 * len(COUNTED))
