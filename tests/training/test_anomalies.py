"""Steps whose numbers are wrong: what is one, what becomes of it, and that all ranks decide alike."""

import math
from dataclasses import replace
from statistics import median

import pytest
import torch

from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.errors import CheckpointError
from megatron_bert_tp.training.anomalies import AnomalyNumbers, Consequence, NormHistory
from tests.support import Layout, Recipe
from tests.test_layouts import name_of
from tests.trainers import CORPUS_SHAPE, run
from tests.training.runs import records, without_times
from tests.training.spoiling import Outcome, Spoil, same_bits, train_spoilt, train_without_step
from tests.training.test_resume import tensors

RECIPE = Recipe(shape=CORPUS_SHAPE, dtype=torch.float32, num_steps=4, clip_norm=0.5, rate=1e-3)
LAYER = "bert.encoder.layer.4"  # on the last stage
SKIP = "run.anomalies.not_finite=skip"
SHARDED = Layout(data=2, shards=True)
LAYOUTS = [
    Layout(data=2, tensor=2),
    SHARDED,
    Layout(pipeline=2, schedule="zb-h1", recompute="full"),
    Layout(tensor=2, sequence=True, packing="packed"),
]
NUMBERS = AnomalyNumbers(spike_window=5, spike_factor=10.0, spike="skip", not_finite="skip", most_skips=3)


def judged(history: NormHistory, norms: list[float], numbers: AnomalyNumbers = NUMBERS) -> list[str]:
    """What becomes of each step; a stop is followed as if it were none."""
    found = []
    for norm in norms:
        anomaly = history.judge(1.0, norm, numbers)
        found.append("taken" if anomaly is None else anomaly.consequence.value)
        history = history.after(norm, anomaly, numbers)
    return found


def test_a_norm_above_ten_times_the_median_of_the_latest_is_a_spike_and_one_at_ten_times_is_none():
    history = NormHistory((1.0, 2.0, 3.0, 4.0, 5.0))  # median 3
    assert history.judge(1.0, 30.0, NUMBERS) is None
    anomaly = history.judge(1.0, 30.000001, NUMBERS)
    assert (anomaly.is_spike, anomaly.usual, anomaly.consequence) == (True, 3.0, Consequence.SKIPPED)


def test_only_the_latest_norms_count():
    # The median of the last five is 1, and that of all 100.
    assert judged(NormHistory((100.0,) * 6 + (1.0,) * 5), [11.0]) == ["skipped"]


def test_nothing_is_a_spike_before_half_a_window_of_norms():
    assert judged(NormHistory(), [1.0, 1000.0, 1e6]) == ["taken"] * 3
    assert judged(NormHistory(), [1.0, 1.0, 1.0, 1000.0]) == ["taken"] * 3 + ["skipped"]
    assert [AnomalyNumbers(spike_window=window).fewest_norms for window in (5, 50)] == [3, 25]


def test_norms_of_skipped_steps_stay_out_of_the_history_and_those_of_reported_ones_do_not():
    history = NormHistory((1.0, 1.0, 1.0))
    spike = history.judge(1.0, 50.0, NUMBERS)
    assert history.after(50.0, spike, NUMBERS) == NormHistory((1.0, 1.0, 1.0), skipped_in_a_row=1)
    reporting = replace(NUMBERS, spike="report")
    assert history.after(50.0, history.judge(1.0, 50.0, reporting), reporting).norms == (1.0, 1.0, 1.0, 50.0)


def test_skips_are_counted_in_a_row_and_the_last_one_allowed_stops():
    nan = math.nan
    assert judged(NormHistory(), [nan, nan, 1.0, nan, nan, nan]) == [
        *("skipped", "skipped", "taken", "skipped", "skipped", "stopped")
    ]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
def test_a_loss_or_norm_that_is_not_finite_is_no_spike(loss, norm):
    anomaly = NormHistory((1.0,) * 5).judge(loss, norm, replace(NUMBERS, not_finite="stop"))
    assert (anomaly.is_spike, anomaly.consequence) == (False, Consequence.STOPPED)


def test_without_a_factor_nothing_is_a_spike():
    assert judged(NormHistory((1.0,) * 5), [1e30], replace(NUMBERS, spike_factor=None)) == ["taken"]


def test_history_comes_back_from_the_facts_of_a_checkpoint_and_is_empty_in_older_ones():
    assert NormHistory.from_facts({"norms": [0.1, 3.0], "skipped_in_a_row": 2}) == NormHistory((0.1, 3.0), 2)
    assert NormHistory.from_facts({"samples": 8}) == NormHistory()


@pytest.mark.parametrize(
    "facts",
    [
        {"norms": {}}, {"norms": "12"}, {"norms": [1]}, {"norms": [True]}, {"norms": [1.0, None]},
        {"norms": [math.inf]}, {"norms": [math.nan]}, {"norms": [-1.0]}, {"norms": [1.0] * 10_001},
        {"skipped_in_a_row": -1}, {"skipped_in_a_row": 1.0}, {"skipped_in_a_row": True},
    ],
    ids=str,
)  # fmt: skip
def test_facts_that_are_no_history_are_refused(facts):
    with pytest.raises(CheckpointError, match="start a new run from its weights"):
        NormHistory.from_facts(facts)


@pytest.mark.parametrize("unit", ["steps", "samples"])
def test_the_advice_names_the_warm_up_of_the_run(ranks, data, unit):
    spoil = Spoil("output", f"{LAYER}.intermediate.dense")
    (outcome,) = ranks.run(1, train_spoilt, data, RECIPE, Layout(), spoil, f"optimizer.schedule_unit={unit}")
    assert f"lengthen the warm-up (optimizer.warmup_{unit}), or look at these samples" in outcome.error


def assert_alike(outcomes: list[Outcome]) -> Outcome:
    """All ranks decide alike, tell alike, and count alike."""
    first = outcomes[0]
    for other in outcomes[1:]:
        assert (other.error, other.error_kind, other.num_steps) == (first.error, first.error_kind, first.num_steps)
        assert (other.skipped, other.counters) == (first.skipped, first.counters)
        assert [report.message for report in other.reports] == [report.message for report in first.reports]
    return first


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_a_skipped_step_moves_nothing_and_what_follows_is_a_run_without_it(ranks, data, layout):
    spoil = Spoil("output", f"{LAYER}.intermediate.dense", rank=layout.world - 1)
    outcomes = ranks.run(layout.world, train_spoilt, data, RECIPE, layout, spoil, SKIP)
    first = assert_alike(outcomes)
    assert first.skipped == [False, True, False, False]
    assert all(each.moved == [True, False, True, True] for each in outcomes)
    assert first.counters == (3, {3.0})
    truth = ranks.run(layout.world, train_without_step, data, RECIPE, layout, 2)
    for found, wanted in zip(outcomes, truth, strict=True):
        assert [found.losses[0], *found.losses[2:]] == wanted.losses
        assert all(map(same_bits, found.weights, wanted.weights))


def test_too_many_skips_in_a_row_end_the_run_on_all_ranks(ranks, data):
    spoil = Spoil("gradient", f"{LAYER}.output.dense", rank=1, steps=(1, 3, 4), value=math.inf)
    given = (data, replace(RECIPE, num_steps=6), SHARDED, spoil, SKIP, "run.anomalies.most_skips=2")
    outcomes = ranks.run(2, train_spoilt, *given)
    first = assert_alike(outcomes)
    assert (first.error_kind, first.num_steps, first.skipped) == ("NotFiniteError", 3, [True, False, True])
    assert all(each.moved == [False, True, False, False] for each in outcomes)
    assert first.error.startswith("step 4 (samples 24 to 31): loss ")
    assert "2 steps in a row were of no use (run.anomalies.most_skips)" in first.error
    assert [report.stops for report in first.reports] == [False, False, True]


@pytest.mark.parametrize("policy", ["report", "skip", "stop"])
def test_a_spike_is_attributed_to_its_tensor_and_reported_skipped_or_ends_the_run(ranks, data, policy):
    name = f"{LAYER}.ln.weight"
    spoil = Spoil("weight gradient", name, rank=1, steps=(5,), value=1e4)
    given = "run.anomalies.spike_window=5", f"run.anomalies.spike={policy}"
    outcomes = ranks.run(2, train_spoilt, data, replace(RECIPE, num_steps=6), SHARDED, spoil, *given)
    first = assert_alike(outcomes)
    (report,) = first.reports
    assert report.anomaly.is_spike
    # Four microbatches of a step have that element, and all other gradients together a norm of some ones.
    assert report.anomaly.norm == pytest.approx(2e4, rel=1e-2)
    assert next(iter(report.attribution.tensors)) == name
    assert report.attribution.tensors[name] == pytest.approx(1.0, rel=1e-3)
    assert len(report.attribution.tensors) == 5
    assert f"Largest shares of its square: {name} 100%" in report.message
    ends = {"report": (None, 6), "skip": (None, 6), "stop": ("NotFiniteError", 4)}
    assert (first.error_kind, first.num_steps) == ends[policy]
    assert all(each.moved[4] is (policy == "report") for each in outcomes)
    assert first.skipped[4:] == {"report": [False, False], "skip": [True, False], "stop": []}[policy]


def test_an_overflow_in_float16_is_the_loss_scales_business(ranks, data):
    recipe = replace(RECIPE, dtype=torch.float16)
    spoil = Spoil("output", f"{LAYER}.output.dense")
    (outcome,) = ranks.run(1, train_spoilt, data, recipe, Layout(), spoil, "optimizer.loss_scale.initial=64")
    assert (outcome.reports, outcome.skipped) == ([], [False, True, False, False])


def expected_skips(norms: list[float], factor: float, window: int) -> list[int]:
    """By hand: norms of steps that are taken, and whether the next is above ``factor`` times their median."""
    taken: list[float] = []
    skips = []
    for norm in norms:
        is_spike = len(taken[-window:]) >= (window + 1) // 2 and norm > factor * median(taken[-window:])
        skips.append(int(is_spike))
        if not is_spike:
            taken.append(norm)
    return skips


def test_a_resumed_run_judges_its_steps_as_the_uninterrupted_one(ranks, data, tmp_path):
    recipe, layout = replace(RECIPE, num_steps=12), SHARDED
    given = ["run.save_every=6", "run.evaluation_samples=0", "run.anomalies.spike=skip"]
    given += [f"run.anomalies.{setting}" for setting in ("spike_factor=1.01", "spike_window=5", "most_skips=100")]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    ranks.run(2, run, data, recipe, layout, f"run.directory={whole}", *given)
    middle = whole / "checkpoints" / "step_00000006"
    ranks.run(2, run, data, recipe, layout, f"run.directory={resumed}", f"run.resume={middle}", *given)
    rows = records(whole, "step")
    skips = [row["skipped"] for row in rows]
    assert skips == expected_skips([row["grad_norm"] for row in rows], 1.01, 5)
    # Guards the comparison: with an empty history the second half would be judged otherwise.
    assert skips[6:] != expected_skips([row["grad_norm"] for row in rows[6:]], 1.01, 5)
    assert without_times(records(resumed, "step")) == without_times(rows)[6:]
    truth, found = tensors(Checkpoint.open(whole)), tensors(Checkpoint.open(resumed))
    assert [name for name in truth if not torch.equal(truth[name], found[name])] == []
