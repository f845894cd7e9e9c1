"""The learning rate as a function of the step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearSchedule:
    """Linear warm-up to ``peak`` over ``warmup`` steps, then linear decay to ``final`` over the rest."""

    peak: float
    final: float
    warmup: int
    steps: int


def learning_rate(step: int, schedule: LinearSchedule) -> float:
    """Rate of optimizer step ``step`` (from 0).

    The first step has ``peak / warmup``, so that no step is lost to a rate of 0; ``final`` is what the
    decay would reach just after the last step.
    """
    if step < schedule.warmup:
        return schedule.peak * (step + 1) / schedule.warmup
    left = (schedule.steps - step) / max(1, schedule.steps - schedule.warmup)
    return schedule.final + (schedule.peak - schedule.final) * max(0.0, left)
