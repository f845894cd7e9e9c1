"""The learning rate against numbers worked out by hand."""

import pytest

from megatron_bert_tp.optim.learning_rate import LinearSchedule, learning_rate

SCHEDULE = LinearSchedule(peak=1.0, final=0.2, warmup=4, steps=12)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (6, 0.8), (8, 0.6), (11, 0.3), (12, 0.2)],
)
def test_warm_up_rises_in_equal_parts_and_decay_falls_on_a_line(step, rate):
    assert learning_rate(step, SCHEDULE) == pytest.approx(rate, abs=1e-15)


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert learning_rate(0, LinearSchedule(peak=3.0, final=0.0, warmup=0, steps=5)) == 3.0


def test_a_run_of_warm_up_alone_ends_at_the_peak():
    assert learning_rate(4, LinearSchedule(peak=2.0, final=0.0, warmup=5, steps=5)) == 2.0
