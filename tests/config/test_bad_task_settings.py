"""Every way to get one setting of a task wrong is told, as for pretraining."""

import re
import time

import pytest

from megatron_bert_tp.config.kinds import is_optional, name_of
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.config.settings import all_settings
from megatron_bert_tp.config.task_schema import TaskRun
from tests.config.bad_task_settings import BAD_TASK
from tests.config.test_bad_settings import problem_of

SETTINGS = all_settings(TaskRun)
# Rows of these settings are those of pretraining, which `test_bad_settings.py` tries.
SHARED = {path for path, row in SETTINGS.items() if all_settings(Config).get(path) == row}
REQUIRED = {path for path, row in SETTINGS.items() if row.is_required}


@pytest.mark.parametrize(
    ("path", "text", "rule"), BAD_TASK, ids=[f"{path}={text[:24]}" for path, text, _ in BAD_TASK]
)
def test_one_bad_value_is_told_with_path_line_rule_and_way_out(task_complaint, path, text, rule):
    started = time.process_time()
    problem = problem_of(task_complaint({path: text}), path, rule)
    assert time.process_time() - started < 1
    assert re.search(r"settings\.yaml:\d+\)", problem)
    assert re.search(r"\n      -> \S.{2,}", problem)


def test_table_breaks_every_setting_that_pretraining_has_not():
    assert {path for path, _, _ in BAD_TASK} >= set(SETTINGS) - SHARED
    assert len(set(BAD_TASK)) == len(BAD_TASK) > 40


def test_settings_that_both_schemas_have_are_the_same_rows_but_for_those_that_the_task_tells_otherwise():
    both = SETTINGS.keys() & all_settings(Config).keys()
    assert both - SHARED == {
        "model.weights",
        "model.hidden_dropout_prob",
        "model.attention_probs_dropout_prob",
        "data.sequence_length",
        "optimizer.steps",
        "optimizer.schedule",
        "run.evaluate_every",
    }


@pytest.mark.parametrize("path", sorted(REQUIRED))
def test_missing_required_setting_is_told(task_complaint, path):
    section, _, name = path.rpartition(".")
    message = task_complaint({path: None})
    blamed = section if f"  {section}\n" in message else path
    assert name in problem_of(message, blamed, "require")


@pytest.mark.parametrize("path", sorted(set(SETTINGS) - REQUIRED - {"parallel.microbatch", "data.train"}))
def test_setting_with_a_default_may_be_left_out(load_a_task, path):
    assert load_a_task({path: None})


@pytest.mark.parametrize("row", SETTINGS.values(), ids=lambda row: row.path)
def test_no_setting_takes_a_mapping_or_an_alien_kind(task_complaint, row):
    assert row.path in task_complaint({row.path: "{a: 1}"})
    if not is_optional(row.kind):
        assert row.path in task_complaint({row.path: "null"})
    if not name_of(row.kind).startswith("true | false"):
        assert row.path in task_complaint({row.path: "true"})


@pytest.mark.parametrize("row", [row for row in SETTINGS.values() if row.bounds], ids=lambda row: row.path)
def test_bounds_of_the_schema_are_kept_at_the_very_edge(row):
    steps = {"at_least": (0, -1), "above": (1, 0), "at_most": (0, 1), "below": (-1, 0)}
    for name, limit in row.bounds.items():
        inside, outside = steps[name]
        tiny = 1 if "integer" in name_of(row.kind) else 1e-9
        assert row.allows(limit + inside * tiny)
        assert row.allows((limit + inside * tiny,))
        assert not row.allows(limit + outside * tiny)
        assert not row.allows((limit + inside * tiny, limit + outside * tiny))


@pytest.mark.parametrize(
    ("path", "text", "meant"),
    [
        ("task.nam", "sst-2", "task.name"),
        ("task.smoothing", "0.1", "task.label_smoothing"),
        ("optimizer.warmup_steps", "5", "optimizer.warmup_share"),
        ("run.metrics", "f1", "run.metric"),
        ("run.seed", "1", "run.seeds"),
        ("data.seq_length", "64", "data.sequence_length"),
        ("columns.text", "a", "task.columns"),
        ("model.frozen", "2", "model.frozen_layers"),
    ],
)
def test_unknown_setting_gets_a_suggestion(task_complaint, path, text, meant):
    message = task_complaint({path: text})
    assert "is no setting" in message
    assert re.search(rf"did you mean (.* or )?{re.escape(meant)}( or .*)?\?", message)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("SST-2", "sst-2"),
        ("sst2", "sst-2"),
        ("stsb", "sts-b"),
        ("squad-v2", "squad"),
        ("multiple_choice", "multiple-choice"),
        ("token_classification", "token-classification"),
        ("multilabel", "multi-label"),
        ("mnli-m", "mnli"),
    ],
)
def test_unknown_task_gets_a_near_match(task_complaint, name, meant):
    assert f"did you mean {meant}?" in task_complaint({"task.name": name})


def test_unknown_task_like_no_other_gets_all_of_them(task_complaint):
    assert "-> choose cola, sst-2, mrpc, " in task_complaint({"task.name": "xyzzy"})


def test_all_problems_are_told_at_once(task_complaint):
    changes = {
        "model.weights": None,
        "task.labels": "[good, bad]",
        "task.n_best": "5",
        "data.draw": "3",
        "run.metric": "f1",
        "run.device": "tpu",
    }
    message = task_complaint(changes, "optimizer.epochs=0", "task.colums.text=a", world_size=7)
    for path, rule in [
        ("model", "requires") if "  model\n" in message else ("model.weights", "is required"),
        ("task.labels", "must hold the labels of sst-2"),
        ("task.n_best", "squad alone"),
        ("data.draw", "data.most_train"),
        ("run.metric", "must be a metric"),
        ("run.device", "must be"),
        ("optimizer.epochs", "above 0"),
        ("task.colums.text", "is no setting"),
        ("world", "multiple of 4"),
    ]:
        problem_of(message, path, rule)
    assert message.startswith("9 problems in the settings of ")
