"""What a rule is that ties several settings together, how rules are run, and the numbers that a way out names.

A rule is run when all settings that it reads are valid, whatever else is wrong.  It returns what is
broken, or None.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_bert_tp.config.problems import Problem, listed, shown

WORLD_SIZE = "world size"
_NUM_SHOWN = 12


@dataclass(frozen=True)
class Broken:
    """The rule that does not hold, with the values, and the way out."""

    rule: str
    way_out: str


@dataclass(frozen=True)
class Rule:
    """A check and the paths of the settings that it takes; the first one is blamed."""

    paths: tuple[str, ...]
    check: Callable[..., Broken | None]


def broken_rules(rules: Sequence[Rule], values: Mapping[str, object], world_size: int | None) -> list[Problem]:
    """Problems of those rules whose settings are all in ``values``; rules of the world size if one is given."""
    return _run(rules, {**values, WORLD_SIZE: world_size})


def world_problems(rules: Sequence[Rule], values: Mapping[str, object], world_size: int) -> list[Problem]:
    """Problems of the rules that read the world size alone."""
    return broken_rules([rule for rule in rules if WORLD_SIZE in rule.paths], values, world_size)


def _run(rules: Sequence[Rule], values: Mapping[str, object]) -> list[Problem]:
    problems = []
    for rule in rules:
        if all(path in values for path in rule.paths):
            broken = rule.check(*(values[path] for path in rule.paths))
            if broken:
                problems.append(_problem(rule.paths[0], values, broken))
    return problems


def _problem(path: str, values: Mapping[str, object], broken: Broken) -> Problem:
    return Problem(path=path, rule=broken.rule, way_out=broken.way_out, value=shown(values[path]))


def divisors(*numbers: int) -> list[int]:
    """Numbers that divide all of ``numbers``, ascending."""
    common = math.gcd(*numbers)
    small = [n for n in range(1, math.isqrt(common) + 1) if common % n == 0]
    return sorted({*small, *(common // n for n in small)})


def near(number: int, step: int) -> str:
    """The multiples of ``step`` below and above ``number``."""
    below = number - number % step
    return listed([size for size in (below, below + step) if size])


def shortened(sizes: Sequence[int]) -> str:
    """The first of ``sizes`` as text."""
    text = ", ".join(map(str, sizes[:_NUM_SHOWN]))
    return text if len(sizes) <= _NUM_SHOWN else f"{text}, ..."
