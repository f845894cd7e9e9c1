"""What a rule is that ties several settings together, and the numbers that its way out names."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_bert_tp.config.problems import listed

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
