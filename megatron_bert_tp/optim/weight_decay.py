"""Weight decay as a function of what is done: constant, or a ramp over the run."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class WeightDecay:
    """Decay that goes from ``first`` to ``final`` over ``length`` steps or samples."""

    curve: str
    first: float
    final: float
    length: int


def weight_decay(done: int, ramp: WeightDecay) -> float:
    """Decay of the step that follows ``done`` steps or samples; ``final`` is reached after the last one."""
    share = min(1.0, done / max(1, ramp.length))
    return ramp.first + (ramp.final - ramp.first) * _CURVES[ramp.curve](share)


def _constant(_share: float) -> float:
    return 0.0


def _linear(share: float) -> float:
    return share


def _cosine(share: float) -> float:
    return (1 - math.cos(math.pi * share)) / 2


_CURVES: Mapping[str, Callable[[float], float]] = {"constant": _constant, "linear": _linear, "cosine": _cosine}
