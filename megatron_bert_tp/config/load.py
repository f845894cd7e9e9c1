"""From a YAML file and overrides to the settings of a run, or to one error that lists all that is wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar, get_type_hints

from megatron_bert_tp.config.dump import Settings, flat
from megatron_bert_tp.config.gather import gather_file, gather_overrides, missing, valid_values
from megatron_bert_tp.config.problems import Problem, report
from megatron_bert_tp.config.reader import Entry, read_file
from megatron_bert_tp.config.rule import Rule, broken_rules, world_problems
from megatron_bert_tp.config.rules import RULES
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.config.settings import joined
from megatron_bert_tp.config.task_rules import EVALUATION_RULES, FINETUNING_RULES
from megatron_bert_tp.config.task_schema import TaskRun
from megatron_bert_tp.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Section = TypeVar("_Section", bound="DataclassInstance")
Purpose = Literal["finetune", "evaluate"]


@dataclass(frozen=True)
class Schema(Generic[_Section]):
    """What settings there are, as the dataclass that holds all of them, and the rules that they keep."""

    root: type[_Section]
    rules: tuple[Rule, ...]


PRETRAINING = Schema(Config, RULES)
TASKS: Mapping[Purpose, Schema[TaskRun]] = {
    "finetune": Schema(TaskRun, FINETUNING_RULES),
    "evaluate": Schema(TaskRun, EVALUATION_RULES),
}
_OF_TASKS_ALONE = "task"  # a section that every file of a task has


def load_config(path: Path, overrides: Sequence[str] = (), *, world_size: int | None = None) -> Config:
    """Settings of pretraining: those of a YAML file, with ``section.key=value`` overrides put over them.

    Raises one `ConfigError` with all problems: each with its path, line, rule, value and a way out.
    With ``world_size``, the rules that tie it to the layout are checked too.
    """
    return load_settings(PRETRAINING, path, overrides, world_size=world_size)


def load_task(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    purpose: Purpose = "finetune",
    world_size: int | None = None,
) -> TaskRun:
    """Settings of a task, as `load_config`; an evaluation needs no training data, and no batch that fits."""
    return load_settings(TASKS[purpose], path, overrides, world_size=world_size)


def load_any(path: Path, overrides: Sequence[str] = (), *, world_size: int | None = None) -> Settings:
    """Settings of pretraining or of fine-tuning, as their sections tell."""
    names = [entry.name for entry in read_file(path).entries]
    names += [override.partition("=")[0].strip() for override in overrides]
    is_task = any(name.partition(".")[0] == _OF_TASKS_ALONE for name in names)
    load = load_task if is_task else load_config
    return load(path, overrides, world_size=world_size)


def load_settings(
    schema: Schema[_Section], path: Path, overrides: Sequence[str], *, world_size: int | None
) -> _Section:
    """Settings of ``schema``, as `load_config`."""
    file = gather_file(schema.root, read_file(path))
    above = gather_overrides(schema.root, overrides)
    given = {**file.given, **above.given}
    values, mismatches = valid_values(schema.root, given)
    problems = [
        *file.problems,
        *above.problems,
        *missing(schema.root, given),
        *mismatches,
        *(_placed(problem, given) for problem in broken_rules(schema.rules, values, world_size)),
    ]
    if problems:
        raise ConfigError(report(problems, str(path)))
    return _built(schema.root, values, "")


def check_world(config: Config, world_size: int) -> list[Problem]:
    """What is wrong with running ``config`` on ``world_size`` processes."""
    return world_problems(RULES, flat(config), world_size)


def _placed(problem: Problem, given: Mapping[str, Entry]) -> Problem:
    entry = given.get(problem.path)
    return replace(problem, place=entry.place if entry else None)


def _built(kind: type[_Section], values: Mapping[str, object], path: str) -> _Section:
    hints = get_type_hints(kind)
    parts = {}
    for field in fields(kind):
        inside = joined(path, field.name)
        is_setting = inside in values
        parts[field.name] = values[inside] if is_setting else _built(hints[field.name], values, inside)
    return kind(**parts)
