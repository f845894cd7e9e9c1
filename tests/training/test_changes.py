"""Which settings may change when a run goes on, and which must be allowed."""

from types import SimpleNamespace

import pytest

from megatron_bert_tp.config.dump import to_dict
from megatron_bert_tp.config.load import load_config
from megatron_bert_tp.errors import ConfigError
from megatron_bert_tp.training.changes import CORPORA, SETTINGS, changed_settings, check_changes


def facts_of(settings, *overrides, corpora=("a",)):
    return {SETTINGS: to_dict(load_config(settings, overrides)), CORPORA: list(corpora)}


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("optimizer.learning_rate=2e-2", "optimizer.learning_rate: 0.01 -> 0.02"),
        ("optimizer.global_batch=4", "optimizer.global_batch: 8 -> 4"),
        ("optimizer.steps=30", "optimizer.steps: 20 -> 30"),
        ("optimizer.batch_ramp={start: 2, increment: 2, samples: 8}", "optimizer.batch_ramp.start: None -> 2"),
        ("optimizer.precision=bfloat16", "optimizer.precision: float32 -> bfloat16"),
        ("optimizer.seed=8", "optimizer.seed: 7 -> 8"),
        ("model.hidden_dropout_prob=0.2", "model.hidden_dropout_prob: 0.1 -> 0.2"),
        ("data.split=[70, 30, 0]", "data.split: [80.0, 20.0, 0.0] -> [70.0, 30.0, 0.0]"),
        ("objective.masking.probability=0.2", "objective.masking.probability: 0.15 -> 0.2"),
        ("objective.pairs=none", "objective.pairs: nsp -> none"),
    ],
)
def test_a_setting_that_decides_the_curve_is_listed_and_refused(data, override, change):
    changed = load_config(data, [override])
    found = changed_settings(facts_of(data), changed, ["a"])
    assert change in found
    with pytest.raises(ConfigError, match=r"run\.allow_changes=true") as caught:
        check_changes(SimpleNamespace(facts=facts_of(data), directory="step_7"), changed, ["a"])
    assert change in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "parallel.microbatch=4",
        "parallel.recompute=full",
        "run.save_every=3",
        "run.anomalies.not_finite=skip",
        "run.stop_after=3h",
        "model.weights=elsewhere",
    ],
)
def test_how_a_run_runs_may_change(data, override):
    assert changed_settings(facts_of(data), load_config(data, [override]), ["a"]) == []


def test_a_corpus_may_move_but_not_change(data):
    moved = load_config(data, ["data.corpus=other/corpus"])
    assert changed_settings(facts_of(data), moved, ["a"]) == []
    (change,) = changed_settings(facts_of(data), load_config(data), ["b"])
    assert change.endswith("gives other samples now")
    (change,) = changed_settings(facts_of(data), moved, ["b"])
    assert change.endswith("-> ['other/corpus']")


def test_an_old_checkpoint_knows_its_corpus_by_name_and_had_defaults_for_what_did_not_exist(data):
    facts = facts_of(data)
    del facts[CORPORA]
    del facts[SETTINGS]["optimizer"]["batch_ramp"], facts[SETTINGS]["optimizer"]["name"]
    assert changed_settings(facts, load_config(data), ["a"]) == []
    assert changed_settings(facts, load_config(data, ["optimizer.name=sgd"]), ["a"]) == [
        "optimizer.name: adamw -> sgd"
    ]
    assert len(changed_settings(facts, load_config(data, ["data.corpus=other/corpus"]), ["a"])) == 1


@pytest.mark.parametrize(
    ("schedule", "is_change"),
    [
        (["optimizer.schedule=constant"], False),
        (["optimizer.schedule=inverse_square_root"], False),
        (["optimizer.schedule=linear", "optimizer.decay_steps=9"], False),
        (["optimizer.schedule=wsd", "optimizer.decay_steps=9"], True),
        (["optimizer.schedule=constant", "optimizer.weight_decay_ramp=linear"], True),
        (["optimizer.schedule=cosine"], True),
    ],
)
def test_a_run_may_be_longer_where_its_first_steps_stay_the_same(data, schedule, is_change):
    """Checked against the rates themselves."""
    from megatron_bert_tp.optim.learning_rate import learning_rate
    from megatron_bert_tp.optim.weight_decay import weight_decay
    from megatron_bert_tp.training.numbers import update_numbers

    schedule = [*schedule, "optimizer.final_weight_decay=0.1"] if "linear" in schedule[-1] else schedule
    short, long = (load_config(data, [*schedule, f"optimizer.steps={steps}"]) for steps in (20, 40))
    numbers = [update_numbers(config.optimizer, config.run.anomalies) for config in (short, long)]
    curves = [[(learning_rate(t, n.rates), weight_decay(t, n.decay)) for t in range(20)] for n in numbers]
    assert (curves[0] != curves[1]) == is_change
    changes = changed_settings({SETTINGS: to_dict(short), CORPORA: []}, long, [])
    assert changes == (["optimizer.steps: 20 -> 40"] if is_change else [])
