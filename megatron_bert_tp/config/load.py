"""From a YAML file and overrides to a `Config`, or to one error that lists all that is wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_type_hints

from megatron_bert_tp.config.dump import flat
from megatron_bert_tp.config.gather import gather_file, gather_overrides, missing, valid_values
from megatron_bert_tp.config.problems import Problem, report
from megatron_bert_tp.config.reader import Entry, read_file
from megatron_bert_tp.config.rules import broken_rules, world_problems
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.config.settings import joined
from megatron_bert_tp.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Section = TypeVar("_Section", bound="DataclassInstance")


def load_config(path: Path, overrides: Sequence[str] = (), *, world_size: int | None = None) -> Config:
    """Settings of a YAML file, with ``section.key=value`` overrides put over them.

    Raises one `ConfigError` with all problems: each with its path, line, rule, value and a way out.
    With ``world_size``, the rules that tie it to the layout are checked too.
    """
    file = gather_file(read_file(path))
    above = gather_overrides(overrides)
    given = {**file.given, **above.given}
    values, mismatches = valid_values(given)
    problems = [
        *file.problems,
        *above.problems,
        *missing(given),
        *mismatches,
        *(_placed(problem, given) for problem in broken_rules(values, world_size)),
    ]
    if problems:
        raise ConfigError(report(problems, str(path)))
    return _built(Config, values, "")


def check_world(config: Config, world_size: int) -> list[Problem]:
    """What is wrong with running ``config`` on ``world_size`` processes."""
    return world_problems(flat(config), world_size)


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
