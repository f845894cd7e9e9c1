"""Settings as plain data: nested dicts, flat paths, YAML text, and what differs between two."""

import json
import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.config.settings import joined
from megatron_bert_tp.config.task_schema import TaskRun

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = Config | TaskRun
"""All settings of a run: of pretraining, or of a task."""


def to_dict(config: Settings) -> dict[str, object]:
    """Sections as nested dicts of plain values; tuples become lists."""
    return _nested(config)


def flat(config: Settings) -> dict[str, object]:
    """Value of every setting under its path, such as ``model.hidden_size``."""
    return dict(_leaves(config, ""))


def differences(old: Settings, new: Settings) -> list[tuple[str, object, object]]:
    """Settings of one schema whose value differs, as (path, old value, new value)."""
    after = flat(new)
    return [(path, value, after[path]) for path, value in flat(old).items() if value != after[path]]


def to_yaml(config: Settings) -> str:
    """YAML text from which `load_config` or `load_task` reads equal settings."""
    return "".join(_lines(config, indent=0))


def write_config(config: Settings, path: Path) -> None:
    """Write ``config`` as YAML in one step: a reader sees the old file or the new one, whole."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(to_yaml(config), encoding="utf-8")
    os.replace(partial, path)


def _nested(section: "DataclassInstance") -> dict[str, object]:
    return {name: _plain(value) for name, value in _members(section)}


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return _nested(value)
    return list(value) if isinstance(value, tuple) else value


def _leaves(section: "DataclassInstance", path: str) -> Iterator[tuple[str, object]]:
    for name, value in _members(section):
        if is_dataclass(value) and not isinstance(value, type):
            yield from _leaves(value, joined(path, name))
        else:
            yield joined(path, name), value


def _lines(section: "DataclassInstance", indent: int) -> Iterator[str]:
    for name, value in _members(section):
        if is_dataclass(value) and not isinstance(value, type):
            yield f"{' ' * indent}{name}:\n"
            yield from _lines(value, indent + 2)
        else:
            yield f"{' ' * indent}{name}: {_text(value)}\n"


def _text(value: object) -> str:
    """A value as JSON has it, which any version of YAML reads alike, but for one thing."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    text = json.dumps(value, ensure_ascii=False)
    # YAML 1.1 would read 2e-05 as text: its numbers with an exponent have a point.
    return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text


def _members(section: "DataclassInstance") -> Iterator[tuple[str, object]]:
    """Names and values, nested sections last: with a base class, its fields come first, sections or not."""
    members = ((field.name, getattr(section, field.name)) for field in fields(section))
    yield from sorted(members, key=lambda member: is_dataclass(member[1]))
