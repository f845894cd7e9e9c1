"""The loss scale that keeps float16 gradients in range: one immutable value, and the next one after a step.

The loss is multiplied by the scale before the backward pass, the gradients are divided by it before the norm.
The rules are those of Megatron-LM's ``DynamicGradScaler``.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

from megatron_bert_tp.errors import CheckpointError

GROWTH_FACTOR = 2.0
BACKOFF_FACTOR = 0.5


@dataclass(frozen=True, kw_only=True)
class LossScaleNumbers:
    """Constants of the rules; the scale first goes down at overflow number ``hysteresis``."""

    initial: float = 2.0**16
    growth_interval: int = 1000
    hysteresis: int = 2
    minimum: float = 1.0
    most_skips: int = 50


@dataclass(frozen=True)
class LossScale:
    """Scale of the next step, and what the rules have counted."""

    scale: float
    good_steps: int
    """Finite steps since the last overflow or growth."""
    bad_steps_left: int
    """Overflows until the scale goes down; from 0 on each of them halves it, until it grows again."""
    skipped_in_a_row: int

    @classmethod
    def begin(cls, numbers: LossScaleNumbers) -> "LossScale":
        """Scale of the first step."""
        return cls(numbers.initial, 0, numbers.hysteresis, 0)

    @classmethod
    def from_facts(cls, facts: object) -> "LossScale":
        """Scale as `facts` wrote it; CheckpointError where it is something else."""
        kinds = {field.name: float if field.name == "scale" else int for field in fields(cls)}
        is_whole = isinstance(facts, Mapping) and all(type(facts.get(name)) is kinds[name] for name in kinds)
        if not isinstance(facts, Mapping) or not is_whole:
            raise CheckpointError(
                f"the loss scale of the checkpoint must hold {', '.join(kinds)}, not {facts!r:.100}; start a new "
                "run from its weights with model.weights="
            )
        return cls(**{name: facts[name] for name in kinds})

    def facts(self) -> dict[str, float | int]:
        """The scale as plain data for a checkpoint."""
        return asdict(self)

    def after(self, is_finite: bool, numbers: LossScaleNumbers) -> "LossScale":
        """Scale of the following step; a step that was not finite must be skipped."""
        return self._after_good_step(numbers) if is_finite else self._after_overflow(numbers)

    def is_hopeless(self, numbers: LossScaleNumbers) -> bool:
        """Whether so many steps in a row were skipped that no scale will help."""
        return self.skipped_in_a_row >= numbers.most_skips

    def _after_good_step(self, numbers: LossScaleNumbers) -> "LossScale":
        if self.good_steps + 1 < numbers.growth_interval:
            return replace(self, good_steps=self.good_steps + 1, skipped_in_a_row=0)
        return LossScale(self.scale * GROWTH_FACTOR, 0, numbers.hysteresis, 0)

    def _after_overflow(self, numbers: LossScaleNumbers) -> "LossScale":
        left = max(0, self.bad_steps_left - 1)
        scale = self.scale if left else max(self.scale * BACKOFF_FACTOR, numbers.minimum)
        return LossScale(scale, 0, left, self.skipped_in_a_row + 1)
