"""The learning rate against numbers worked out by hand."""

import math

import pytest

from megatron_bert_tp.errors import ConfigError
from megatron_bert_tp.optim.learning_rate import Schedule, learning_rate, schedule_of


def schedule(curve: str = "linear", **changes: object) -> Schedule:
    given = {"peak": 1.0, "final": 0.2, "warmup": 4, "length": 12, "decay": None}
    return schedule_of(curve, **{**given, **changes})


def rates(of: Schedule, *, steps: int) -> list[float]:
    return [learning_rate(step, of) for step in range(steps)]


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (6, 0.8), (8, 0.6), (11, 0.3), (12, 0.2)],
)
def test_warm_up_rises_in_equal_parts_and_decay_falls_on_a_line(step, rate):
    assert learning_rate(step, schedule()) == pytest.approx(rate, abs=1e-15)


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert learning_rate(0, schedule(peak=3.0, final=0.0, warmup=0, length=5)) == 3.0


def test_a_run_of_warm_up_alone_ends_at_the_peak():
    assert learning_rate(4, schedule(peak=2.0, final=0.0, warmup=5, length=5)) == 2.0


@pytest.mark.parametrize(("peak", "final", "warmup", "length"), [(1e-4, 0.0, 7, 103), (3e-5, 1e-6, 0, 31)])
def test_the_line_has_the_bits_it_always_had(peak, final, warmup, length):
    """As it was computed before there were other curves: a run that goes on must not jump."""
    found = rates(schedule(peak=peak, final=final, warmup=warmup, length=length), steps=length)
    for step, rate in enumerate(found):
        left = (length - step) / max(1, length - warmup)
        old = peak * (step + 1) / warmup if step < warmup else final + (peak - final) * max(0.0, left)
        assert rate == old


RISE = [0.25, 0.5, 0.75, 1.0]
# cos(k pi / 8) for the cosine: at half the decay the middle of 1 and 0.2, at a quarter 0.6 + 0.4 / sqrt(2).
QUARTER = 0.4 / math.sqrt(2)
AFTER = {
    "linear": [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2],
    "constant": [1.0] * 10,
    "inverse_square_root": [
        1.0, 0.8944271909999159, 0.816496580927726, 0.7559289460184544, 0.7071067811865476, 2 / 3,
        0.6324555320336759, 0.6030226891555273, 0.5773502691896258, 0.5547001962252291,
    ],
}  # fmt: skip


@pytest.mark.parametrize("curve", sorted(AFTER))
def test_curves_after_the_warm_up_are_those_worked_out(curve):
    assert rates(schedule(curve), steps=14) == pytest.approx(RISE + AFTER[curve], abs=1e-15)


def test_cosine_has_its_quarters_and_then_stays():
    found = [learning_rate(step, schedule("cosine")) for step in (4, 6, 8, 10, 12, 13)]
    assert found == pytest.approx([1.0, 0.6 + QUARTER, 0.6, 0.6 - QUARTER, 0.2, 0.2], abs=1e-15)


def test_wsd_is_stable_and_decays_over_the_last_steps():
    expected = [*RISE, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert rates(schedule("wsd", decay=4), steps=13) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("curve", "middle"), [("linear", 0.6), ("cosine", 0.6)])
def test_a_decay_of_its_own_length_ends_before_the_run(curve, middle):
    found = rates(schedule(curve, decay=4), steps=12)
    assert found[:5] == pytest.approx([*RISE, 1.0], abs=1e-15)
    assert found[6] == pytest.approx(middle, abs=1e-15)
    assert found[8:] == pytest.approx([0.2] * 4, abs=1e-15)


def test_inverse_square_root_never_falls_below_the_final_rate():
    assert learning_rate(10_000, schedule("inverse_square_root", final=0.1)) == 0.1


@pytest.mark.parametrize(
    ("done", "size", "rate"),
    # 40 samples of warm-up in batches of 16: 16 / 40, 32 / 40, and the third batch reaches beyond.
    [(0, 16, 0.4), (16, 16, 0.8), (32, 16, 1.0), (48, 16, 0.92), (112, 8, 0.28)],
)
def test_samples_count_like_steps_of_their_size(done, size, rate):
    of_samples = schedule(warmup=40, length=120)
    assert learning_rate(done, of_samples, size=size) == pytest.approx(rate, abs=1e-15)


@pytest.mark.parametrize("curve", ["linear", "cosine", "wsd", "constant", "inverse_square_root"])
def test_a_schedule_in_samples_of_a_constant_batch_is_that_in_steps(curve):
    in_steps = schedule(curve, decay=5 if curve == "wsd" else None)
    in_samples = schedule(curve, warmup=4 * 8, length=12 * 8, decay=5 * 8 if curve == "wsd" else None)
    for step in range(13):
        assert learning_rate(8 * step, in_samples, size=8) == pytest.approx(learning_rate(step, in_steps))


@pytest.mark.parametrize(("warmup", "decay"), [(13, None), (4, 9)])
def test_a_run_too_short_for_warm_up_and_decay_is_told(warmup, decay):
    with pytest.raises(ConfigError, match=r"must not be longer than the run \(12\); shorten them"):
        schedule("wsd", warmup=warmup, decay=decay)
