"""A schema seen as a flat table: one row per setting, under its path such as `model.hidden_size`.

The dataclass at the root of a schema stands for all of it: `Config` for pretraining, `TaskRun` for tasks.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "at_least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "at_most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row: path, annotation, default, meaning, and the bounds that are set."""

    path: str
    kind: object
    meaning: str
    is_required: bool
    default: object
    bounds: Mapping[str, float]

    def range(self) -> str:
        """Allowed range in words; empty where there is none."""
        return " and ".join(f"{_BOUNDS[name][0]} {limit}" for name, limit in self.bounds.items())

    def allows(self, value: object) -> bool:
        """Whether a value of the right kind lies within the bounds; of a list, all that it holds."""
        if isinstance(value, tuple):
            return all(map(self.allows, value))
        if not isinstance(value, int | float):
            return True
        return all(_BOUNDS[name][1](value, limit) for name, limit in self.bounds.items())


@cache
def all_settings(root: type) -> Mapping[str, Setting]:
    """Every setting of the schema with this root under its path, in the order of the schema."""
    return {row.path: row for section, kind in all_sections(root).items() for row in _rows(section, kind)}


@cache
def all_sections(root: type) -> Mapping[str, type]:
    """Dataclass of every section under its path, nested ones after the section that holds them."""
    return dict(_sections("", root))


def joined(section: str, name: str) -> str:
    """Path of ``name`` inside ``section``, whose path is empty at the top level."""
    return f"{section}.{name}" if section else name


def _sections(path: str, kind: type) -> Iterator[tuple[str, type]]:
    for name, hint in get_type_hints(kind).items():
        if isinstance(hint, type) and is_dataclass(hint):
            yield joined(path, name), hint
            yield from _sections(joined(path, name), hint)


def _rows(section: str, kind: type) -> Iterator[Setting]:
    hints = get_type_hints(kind)
    for field in fields(kind):
        if not is_dataclass(hints[field.name]):
            yield _row(joined(section, field.name), hints[field.name], field)


def _row(path: str, kind: object, field: Field[Any]) -> Setting:
    bounds = {name: field.metadata[name] for name in _BOUNDS if field.metadata[name] is not None}
    return Setting(
        path=path,
        kind=kind,
        meaning=field.metadata["meaning"],
        is_required=field.default is MISSING,
        default=None if field.default is MISSING else field.default,
        bounds=bounds,
    )
