"""The loss scale against sequences worked out by hand from Megatron-LM's rules."""

import json

import pytest

from megatron_bert_tp.errors import CheckpointError
from megatron_bert_tp.optim.loss_scale import LossScale, LossScaleNumbers

NUMBERS = LossScaleNumbers(initial=16.0, growth_interval=3, hysteresis=2, minimum=2.0, most_skips=4)


def walk(signs: str, numbers: LossScaleNumbers = NUMBERS) -> list[LossScale]:
    """Scales after each step of ``+`` (finite) and ``-`` (overflow)."""
    scales = [LossScale.begin(numbers)]
    for sign in signs:
        scales.append(scales[-1].after(sign == "+", numbers))
    return scales[1:]


@pytest.mark.parametrize(
    ("signs", "expected"),
    [
        # Grows after three finite steps in a row; an overflow begins the count anew.
        ("+++" "+++", [16, 16, 32, 32, 32, 64]),
        ("++-" "+++", [16, 16, 16, 16, 16, 32]),
        # The first overflow is borne, the second halves, and so does each after it.
        ("---", [16, 8, 4]),
        # Finite steps between do not give patience back; growth does.
        ("-+-" "+-", [16, 16, 8, 8, 4]),
        ("-+++" "--", [16, 16, 16, 32, 32, 16]),
        # Never below the minimum.
        ("------", [16, 8, 4, 2, 2, 2]),
    ],
)
def test_scale_follows_the_rules(signs, expected):
    assert [scale.scale for scale in walk(signs)] == expected


def test_a_run_is_hopeless_after_so_many_skips_in_a_row():
    assert [scale.is_hopeless(NUMBERS) for scale in walk("---" "+" "----")] == [False] * 7 + [True]
    assert [scale.skipped_in_a_row for scale in walk("--+" "+-")] == [1, 2, 0, 0, 1]


def test_growth_ends_a_row_of_skips():
    assert walk("-+++")[-1] == LossScale(32.0, 0, 2, 0)


def test_defaults_begin_at_two_to_the_sixteenth():
    assert LossScale.begin(LossScaleNumbers()) == LossScale(65536.0, 0, 2, 0)


@pytest.mark.parametrize("signs", ["", "+", "-", "---+", "+++++"])
def test_facts_go_through_json_and_back(signs):
    scale = [LossScale.begin(NUMBERS), *walk(signs)][-1]
    assert LossScale.from_facts(json.loads(json.dumps(scale.facts()))) == scale


@pytest.mark.parametrize(
    "facts",
    [
        None,
        [],
        {},
        {"scale": 16.0, "good_steps": 0, "bad_steps_left": 2},
        {"scale": "16", "good_steps": 0, "bad_steps_left": 2, "skipped_in_a_row": 0},
        {"scale": 16.0, "good_steps": 0.5, "bad_steps_left": 2, "skipped_in_a_row": 0},
        {"scale": 16.0, "good_steps": True, "bad_steps_left": 2, "skipped_in_a_row": 0},
    ],
)
def test_facts_that_are_no_scale_are_told(facts):
    with pytest.raises(CheckpointError, match=r"must hold scale, good_steps.*model\.weights="):
        LossScale.from_facts(facts)
