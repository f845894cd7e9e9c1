"""``section.key=value`` arguments stand above the file and follow the same rules."""

from collections.abc import Callable

import pytest

from megatron_bert_tp.config.dump import flat
from megatron_bert_tp.config.schema import Config

Load = Callable[..., Config]
Complaint = Callable[..., str]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("objective.masking.probability=0.2", 0.2),
        ("optimizer.learning_rate=5e-5", 5e-5),
        ("optimizer.learning_rate=1", 1.0),
        ("optimizer.steps=7", 7),
        ("data.split=[90, 5, 5]", (90.0, 5.0, 5.0)),
        ("data.lowercase=false", False),
        ("model.weights=some/folder", "some/folder"),
        ("model.weights=null", None),
        ("model.weights=", None),
        ("run.directory='2026'", "2026"),
        ('run.directory="two words"', "two words"),
        ("run.directory=runs/a=b", "runs/a=b"),
        ("run.directory=a: b", "a: b"),
        ("run.directory=my run #1", "my run #1"),
        ("run.directory=*star", "*star"),
        ("run.directory=&and", "&and"),
        ("run.directory=- dash", "- dash"),
        ("run.directory=yes", "yes"),
        (" run.directory = padded ", "padded"),
    ],
)
def test_override_sets_its_value(load: Load, override: str, value: object):
    result = flat(load({}, override))[override.partition("=")[0].strip()]
    assert result == value
    assert type(result) is type(value)


def test_override_replaces_the_value_of_the_file_even_a_wrong_one(load: Load):
    assert load({"optimizer.steps": "many"}, "optimizer.steps=7").optimizer.steps == 7


def test_override_changes_nothing_else(load: Load):
    before, after = flat(load()), flat(load({}, "run.log_every=5"))
    assert {path for path in before if before[path] != after[path]} == {"run.log_every"}


def test_override_of_a_section_sets_what_it_names(load: Load):
    masking = load({}, "objective.masking={probability: 0.2, whole_words: false}").objective.masking
    assert (masking.probability, masking.whole_words, masking.mask_share) == (0.2, False, 0.8)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("run.log_every=yes", ["run.log_every = 'yes'  (command line)", "must be an integer"]),
        ("run.log_evry=1", ["run.log_evry  (command line)", "did you mean run.log_every?"]),
        ("log_every=1", ["log_every", "did you mean run.log_every?"]),
        ("run=5", ["run = 5", "is a section"]),
        ("run.log_every.x=5", ["run.log_every.x", "is no setting"]),
        ("=5", ["is no setting"]),
        ("run.log_every", ["an argument reads section.key=value", "write run.log_every=VALUE"]),
        ("--run.log_every=5", ["an argument reads section.key=value", "write run.log_every=VALUE"]),
        ("data.split=[1, 2", ["command line, data.split:1, column "]),
        ("data.split=[1, 2] 3", ["command line, data.split:1, column "]),
        ("run.directory='open", ["command line, run.directory:1, column "]),
        ("run.directory=[*a]", ["anchors (&)"]),
        ("run.directory=\udc80", ["printable"]),
        ('run.directory="\udc80"', ["unprintable"]),
    ],
)
def test_bad_override_is_told(complaint: Complaint, override: str, parts: list[str]):
    message = complaint({}, override)
    assert all(part in message for part in parts), message


def test_the_same_override_twice_is_refused_not_silently_won_by_the_last(complaint: Complaint):
    assert "is given twice, first in command line" in complaint({}, "run.log_every=1", "run.log_every=2")


def test_all_bad_overrides_and_settings_are_told_together(complaint: Complaint):
    message = complaint({"run.keep_last": "0"}, "x=1", "--y", "run.log_every=0")
    assert message.startswith("4 problems ")
