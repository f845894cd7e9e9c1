"""Combinations of optimizer settings: what does not fit is told, and what would be ignored is refused."""

from collections.abc import Callable

import pytest

from megatron_bert_tp.config.optimizer_rules import OPTIMIZER_RULES
from megatron_bert_tp.config.rule import WORLD_SIZE, broken_rules
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.config.settings import all_settings

Complaint = Callable[..., str]
Load = Callable[..., Config]

# Settings, part of the rule, part of the way out; the run has 100 steps of 64 samples, microbatches of 8.
BROKEN = [
    (["name=sgd", "beta1=0.5"], "beta1 = 0.5", "optimizer.beta1 out, or set optimizer.name: adamw or lamb"),
    (["name=sgd", "beta2=0.5"], "is read by adamw or lamb alone, and optimizer.name is sgd", "beta2 out"),
    (["name=sgd", "epsilon=1e-6"], "is read by adamw or lamb alone", "leave optimizer.epsilon out"),
    (["name=lamb", "momentum=0.5"], "is read by sgd alone, and optimizer.name is lamb", "set optimizer.name: sgd"),
    (
        ["schedule_unit=samples", "warmup_steps=5"],
        "counts steps, and optimizer.schedule_unit is samples",
        "use optimizer.warmup_samples, or set optimizer.schedule_unit: steps",
    ),
    (
        ["schedule_unit=samples", "decay_steps=5"],
        "counts steps, and optimizer.schedule_unit is samples",
        "use optimizer.decay_samples, or set optimizer.schedule_unit: steps",
    ),
    (
        ["schedule_unit=samples", "warmup_samples=6401"],
        "optimizer.steps (100) x optimizer.global_batch (64)",
        "use at most 6400, for example 640",
    ),
    (["schedule=constant", "final_learning_rate=1e-6"], "is never reached", "leave optimizer.final_learning_rate"),
    (["schedule=constant", "decay_steps=5"], "is read by linear, cosine or wsd alone", "decay_steps out"),
    (
        ["schedule=inverse_square_root", "warmup_steps=5", "decay_steps=5"],
        "is read by linear, cosine or wsd alone",
        "leave optimizer.decay_steps out, or set optimizer.schedule: linear, cosine or wsd",
    ),
    (
        ["schedule=inverse_square_root", "warmup_samples=50", "decay_samples=5", "schedule_unit=samples"],
        "is read by linear, cosine or wsd alone, and optimizer.schedule is inverse_square_root",
        "leave optimizer.decay_samples out",
    ),
    (
        ["schedule=inverse_square_root", "schedule_unit=samples"],
        "needs optimizer.warmup_samples above 0",
        "set optimizer.warmup_samples",
    ),
    (["schedule=wsd"], "needs optimizer.decay_steps, the length", "a tenth of the run, or choose linear"),
    (["schedule=wsd", "schedule_unit=samples"], "needs optimizer.decay_samples", "set optimizer.decay_samples"),
    (
        ["schedule=wsd", "warmup_steps=60", "decay_steps=41"],
        "plus the warm-up (60) must not be above optimizer.steps (100)",
        "use at most 40, or shorten the warm-up",
    ),
    (["warmup_steps=100", "decay_steps=1"], "plus the warm-up (100)", "-> shorten the warm-up"),
    (
        ["schedule_unit=samples", "warmup_samples=6000", "decay_samples=401"],
        "must not be above optimizer.steps x optimizer.global_batch (6400)",
        "use at most 400, or shorten the warm-up",
    ),
    (["weight_decay_ramp=linear"], "needs optimizer.final_weight_decay", "set it, or choose constant"),
    (["final_weight_decay=0.1"], "does not change the weight decay", "choose linear or cosine, or leave"),
    (["batch_ramp={increment: 8, samples: 9}"], "batch_ramp.start = null", "or leave all out"),
    (["batch_ramp={start: 8, increment: 8}"], "together with increment and samples", "or leave all out"),
    (["batch_ramp={start: 64, increment: 8, samples: 9}"], "must be below", "use a smaller start"),
    (
        ["batch_ramp={start: 8, increment: 16, samples: 9}"],
        "must divide 56 = optimizer.global_batch (64) - optimizer.batch_ramp.start (8)",
        "use a divisor of 56",
    ),
    (
        ["batch_ramp={start: 8, increment: 28, samples: 9}"],
        "must be a multiple of 8 = parallel.microbatch (8) x data size (1)",
        "use 24 or 32, or a smaller parallel.microbatch",
    ),
    (["precision=bfloat16", "loss_scale={initial: 2}"], "is read for float16 alone", "precision: float16"),
    (["loss_scale={growth_interval: 5}"], "growth_interval = 5", "leave optimizer.loss_scale.growth_interval out"),
    (["loss_scale={hysteresis: 3}"], "is read for float16 alone", "leave optimizer.loss_scale.hysteresis out"),
    (["loss_scale={minimum: 2}"], "is read for float16 alone", "leave optimizer.loss_scale.minimum out"),
    (["loss_scale={most_skips: 9}"], "is read for float16 alone", "leave optimizer.loss_scale.most_skips out"),
    (["precision=float16", "loss_scale={initial: 2, minimum: 4}"], "must not be below", "use at least 4.0"),
]
FITTING = [
    ["name=lamb", "beta1=0.5", "beta2=0.6", "epsilon=1e-6"],
    ["name=sgd", "momentum=0"],
    ["name=sgd", "momentum=0.5", "beta1=0.9"],
    ["schedule=constant", "warmup_steps=100"],
    ["schedule=cosine", "final_learning_rate=1e-6", "decay_steps=100"],
    ["schedule=wsd", "warmup_steps=60", "decay_steps=40"],
    ["schedule=wsd", "schedule_unit=samples", "warmup_samples=6000", "decay_samples=400"],
    ["schedule=inverse_square_root", "warmup_steps=1", "final_learning_rate=1e-6"],
    ["schedule_unit=samples", "warmup_samples=6400"],
    ["weight_decay_ramp=cosine", "final_weight_decay=0"],
    ["batch_ramp={start: 8, increment: 8, samples: 1000}"],
    ["batch_ramp={start: 16, increment: 24, samples: 1}"],
    ["precision=float16", "loss_scale={initial: 4, growth_interval: 1, hysteresis: 1, minimum: 4, most_skips: 1}"],
    ["precision=bfloat16"],
]


def as_overrides(changes: list[str]) -> list[str]:
    return [f"optimizer.{change}" for change in changes]


@pytest.mark.parametrize(("changes", "rule", "way_out"), BROKEN, ids=[" ".join(each[0]) for each in BROKEN])
def test_a_combination_that_does_not_fit_is_one_problem(complaint: Complaint, changes, rule, way_out):
    message = complaint({}, *as_overrides(changes))
    assert message.startswith("1 problem ")
    assert rule in message
    assert way_out in message


@pytest.mark.parametrize("changes", FITTING, ids=" ".join)
def test_a_combination_that_fits_is_taken(load: Load, changes):
    assert load({}, *as_overrides(changes))


def test_the_ramp_fits_the_data_size_and_any_packing(load: Load, complaint: Complaint):
    ramp = "optimizer.batch_ramp={start: 8, increment: 8, samples: 100}"
    assert "must be a multiple of 16 = parallel.microbatch (8) x data size (2)" in complaint({}, ramp, world=8)
    packed = {"parallel.packing": "packed", "parallel.microbatch": None, "parallel.microbatch_tokens": "64"}
    assert load(packed, "optimizer.batch_ramp={start: 3, increment: 61, samples: 100}", world=8)


@pytest.mark.parametrize("world", [None, 8])
def test_defaults_break_no_rule_of_the_optimizer(load: Load, world):
    optimizer = load(world=world).optimizer
    assert (optimizer.name, optimizer.schedule, optimizer.schedule_unit) == ("adamw", "linear", "steps")
    assert optimizer.loss_scale.initial == 2**16
    assert optimizer.batch_ramp.start is None


# NVIDIA's apex, told by values alone: whoever lacks it can still be told the rules.
WITH_APEX = {
    "run.fused": "apex",
    "run.device": "auto",
    "optimizer.name": "lamb",
    "optimizer.precision": "bfloat16",
    "optimizer.weight_decay": 0.01,
    "parallel.tensor": 1,
    "parallel.shard_optimizer": False,
}


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"optimizer.name": "sgd"}, "optimizer.name is sgd"),
        ({"optimizer.precision": "float64"}, "needs a GPU and float32 weights"),
        ({"run.device": "cpu"}, "needs a GPU and float32 weights"),
        ({"parallel.tensor": 2}, "it needs parallel.tensor = 1"),
        ({"parallel.shard_optimizer": True}, "no parallel.shard_optimizer; they are 1 and true"),
        ({"optimizer.weight_decay": 0.0}, "needs optimizer.weight_decay above 0"),
    ],
)
def test_what_apex_cannot_do_is_told(changes, rule):
    assert broken_rules(OPTIMIZER_RULES, WITH_APEX, None) == []
    (problem,) = broken_rules(OPTIMIZER_RULES, {**WITH_APEX, **changes}, None)
    assert problem.path == "run.fused"
    assert rule in problem.rule
    assert "run.fused: torch" in problem.way_out
    assert broken_rules(OPTIMIZER_RULES, {**WITH_APEX, **changes, "run.fused": "torch"}, None) == []


@pytest.mark.parametrize("changes", [{"parallel.tensor": 2}, {"parallel.shard_optimizer": True}])
def test_adamw_of_apex_takes_any_rectangle(changes):
    assert broken_rules(OPTIMIZER_RULES, {**WITH_APEX, "optimizer.name": "adamw", **changes}, None) == []


def test_every_rule_reads_settings_that_exist():
    """A rule with a misspelt path would never run."""
    paths = {path for rule in OPTIMIZER_RULES for path in rule.paths}
    assert paths - set(all_settings(Config)) - {WORLD_SIZE} == set()
