"""The end of a step: gradients are summed, the step is taken or skipped, and the weights move."""

import math
from dataclasses import dataclass

import torch

from megatron_bert_tp.errors import TrainingError
from megatron_bert_tp.optim.learning_rate import Schedule, learning_rate
from megatron_bert_tp.optim.loss_scale import LossScale, LossScaleNumbers
from megatron_bert_tp.optim.rules import step_
from megatron_bert_tp.optim.weight_decay import WeightDecay, weight_decay
from megatron_bert_tp.parallel.gradients import Gradients
from megatron_bert_tp.parallel.ownership import OwnedWeights


@dataclass(frozen=True)
class UpdateNumbers:
    """What the size of an update depends on; ``loss_scale`` is None where the number format needs none."""

    clip_norm: float
    rates: Schedule
    decay: WeightDecay
    counts_samples: bool
    """Whether rates and decay go by samples instead of steps."""
    loss_scale: LossScaleNumbers | None


@dataclass(frozen=True)
class Done:
    """How far a run is before a step, and the samples of that step."""

    steps: int
    samples: int
    batch: int

    @property
    def named(self) -> str:
        """The step and its samples, for messages to people."""
        return f"step {self.steps + 1} (samples {self.samples} to {self.samples + self.batch - 1})"


@dataclass(frozen=True)
class Update:
    """What became of a step: norm of the gradients before clipping, rate and decay, and whether it was skipped."""

    grad_norm: float
    learning_rate: float
    weight_decay: float
    loss_scale: float
    is_skipped: bool


class Updater:
    """Gradients, weights and optimizer of one rank.

    All ranks hold the same losses and the same norm, and so decide alike without a message.
    """

    def __init__(
        self,
        gradients: Gradients,
        weights: OwnedWeights,
        optimizer: torch.optim.Optimizer,
        numbers: UpdateNumbers,
        *,
        updates_done: int = 0,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.gradients, self.weights, self.optimizer, self._numbers = gradients, weights, optimizer, numbers
        self.updates_done, self.loss_scale = updates_done, loss_scale

    @property
    def scale(self) -> float:
        """Factor on the loss of the coming step."""
        return 1.0 if self.loss_scale is None else self.loss_scale.scale

    def begin(self, num_microbatches: int) -> None:
        """Forget the gradients before a step."""
        self.gradients.begin(num_microbatches)

    def finish(self, loss: float, done: Done) -> Update:
        """Move the weights, unless something is not finite: then float16 skips the step, and all others stop."""
        scale = self.scale
        norm = self.gradients.reduce_and_norm(scale)
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        rate, decay = self._rate(done), weight_decay(self._counted(done), self._numbers.decay)
        if self.loss_scale is not None:
            self.loss_scale = self._next_scale(self.loss_scale, is_finite, done)
        elif not is_finite:
            raise TrainingError(_not_finite(loss, norm, done))
        if is_finite:
            self.gradients.clip_(norm, self._numbers.clip_norm)
            step_(self.optimizer, rate=rate, weight_decay=decay)
            self.weights.publish()
            self.updates_done += 1
        return Update(norm, rate, decay, scale, not is_finite)

    def _next_scale(self, scale: LossScale, is_finite: bool, done: Done) -> LossScale:
        assert self._numbers.loss_scale is not None
        following = scale.after(is_finite, self._numbers.loss_scale)
        if following.is_hopeless(self._numbers.loss_scale):
            raise TrainingError(
                f"{done.named}: {following.skipped_in_a_row} steps in a row have overflowed in float16, down to a "
                f"loss scale of {scale.scale:g}; the weights are those before the first of them. Lower "
                "optimizer.learning_rate, or set optimizer.precision=bfloat16, which needs no loss scale"
            )
        return following

    def _counted(self, done: Done) -> int:
        return done.samples if self._numbers.counts_samples else done.steps

    def _rate(self, done: Done) -> float:
        size = done.batch if self._numbers.counts_samples else 1
        return learning_rate(self._counted(done), self._numbers.rates, size=size)


def _not_finite(loss: float, norm: float, done: Done) -> str:
    return (
        f"{done.named}: loss {loss}, gradient norm {norm}; both must be finite. The weights are those after step "
        f"{done.steps}. Lower optimizer.learning_rate, lengthen optimizer.warmup_steps, or look at these samples"
    )
