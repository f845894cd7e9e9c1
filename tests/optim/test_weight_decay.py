"""The weight decay's ramp against numbers worked out by hand."""

import math

import pytest

from megatron_bert_tp.optim.weight_decay import WeightDecay, weight_decay

ROOT = math.sqrt(2)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ("constant", [0.1, 0.1, 0.1, 0.1, 0.1, 0.1]),
        ("linear", [0.1, 0.2, 0.3, 0.4, 0.5, 0.5]),
        ("cosine", [0.1, 0.3 - 0.1 * ROOT, 0.3, 0.3 + 0.1 * ROOT, 0.5, 0.5]),
    ],
)
def test_a_ramp_goes_from_the_first_to_the_final_value(curve, expected):
    ramp = WeightDecay(curve, first=0.1, final=0.5, length=40)
    assert [weight_decay(done, ramp) for done in (0, 10, 20, 30, 40, 50)] == pytest.approx(expected, abs=1e-15)


def test_a_ramp_may_fall():
    assert weight_decay(3, WeightDecay("linear", first=0.4, final=0.0, length=4)) == pytest.approx(0.1)


def test_a_constant_decay_is_the_setting_to_the_bit():
    assert weight_decay(7, WeightDecay("constant", first=0.01, final=0.01, length=9)) == 0.01
