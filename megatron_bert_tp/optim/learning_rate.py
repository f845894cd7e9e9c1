"""The learning rate as a function of what is done: optimizer steps, or samples."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_bert_tp.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to ``peak``, then a curve; all lengths in one unit, steps or samples.

    The curve stays at ``peak`` up to ``start`` and has come to ``final`` after ``decay`` more.
    """

    curve: str
    peak: float
    final: float
    warmup: int
    start: int
    decay: int


def schedule_of(
    curve: str, *, peak: float, final: float, warmup: int, length: int, decay: int | None
) -> Schedule:
    """Schedule of a run of ``length`` that decays over ``decay``, or after the warm-up to the end (None).

    ``wsd`` (warm-up, stable, decay) decays at the end of the run, every other curve right after the warm-up.
    Raises `ConfigError` where both do not fit into the run: with a growing batch, only here are its samples known.
    """
    if warmup + (decay or 0) > length:
        raise ConfigError(
            f"the warm-up ({warmup}) and the decay ({decay or 0}) of the learning rate must not be longer than "
            f"the run ({length}); shorten them, or raise optimizer.steps"
        )
    decay = length - warmup if decay is None else decay
    start = length - decay if curve == "wsd" else warmup
    return Schedule(curve, peak, final, warmup, start=start, decay=decay)


def learning_rate(done: int, schedule: Schedule, *, size: int = 1) -> float:
    """Rate of the optimizer step that follows ``done`` steps or samples, and itself takes ``size`` of them.

    Warm-up counts what is done after the step: the first of ``warmup`` steps has ``peak / warmup``, so that
    no step is lost to a rate of 0.  Decay counts what is done before it: ``final`` is what it would reach
    just after the last step.
    """
    if done < schedule.warmup:
        return schedule.peak * min(done + size, schedule.warmup) / schedule.warmup
    return _CURVES[schedule.curve](done, schedule)


def _left(done: int, schedule: Schedule) -> float:
    """Share of the decay that is left, 1 before it begins and 0 after it ends."""
    left = (schedule.start + schedule.decay - done) / max(1, schedule.decay)
    return min(1.0, max(0.0, left))


def _linear(done: int, schedule: Schedule) -> float:
    return schedule.final + (schedule.peak - schedule.final) * _left(done, schedule)


def _cosine(done: int, schedule: Schedule) -> float:
    height = (1 + math.cos(math.pi * (1 - _left(done, schedule)))) / 2
    return schedule.final + (schedule.peak - schedule.final) * height


def _constant(_done: int, schedule: Schedule) -> float:
    return schedule.peak


def _inverse_square_root(done: int, schedule: Schedule) -> float:
    return max(schedule.final, schedule.peak * math.sqrt(max(1, schedule.warmup) / max(1, done)))


_CURVES: Mapping[str, Callable[[int, Schedule], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    "inverse_square_root": _inverse_square_root,
    "wsd": _linear,
}
