"""The end of a step: gradients are summed, the step is taken or skipped, and the weights move."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_bert_tp.errors import NotFiniteError
from megatron_bert_tp.optim.learning_rate import Schedule, learning_rate
from megatron_bert_tp.optim.loss_scale import LossScale, LossScaleNumbers
from megatron_bert_tp.optim.rules import step_
from megatron_bert_tp.optim.weight_decay import WeightDecay, weight_decay
from megatron_bert_tp.parallel.gradients import Gradients
from megatron_bert_tp.parallel.ownership import OwnedWeights
from megatron_bert_tp.parallel.sharding import Part
from megatron_bert_tp.reliability.actions import Actions, Kind
from megatron_bert_tp.training.anomalies import Anomaly, AnomalyNumbers, Consequence, NormHistory

_MOST_TENSORS = 5
"""Tensors that a spike is attributed to."""


@dataclass(frozen=True)
class UpdateNumbers:
    """What the size of an update depends on; ``loss_scale`` is None where the number format needs none."""

    clip_norm: float
    rates: Schedule
    decay: WeightDecay
    counts_samples: bool
    """Whether rates and decay go by samples instead of steps."""
    loss_scale: LossScaleNumbers | None
    anomalies: AnomalyNumbers = field(default_factory=AnomalyNumbers)


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
    anomaly: Anomaly | None = None
    """What is wrong with the step; an overflow in float16, which is the loss scale's business, is none."""
    tensors: Mapping[str, float | None] = field(default_factory=dict)
    """Tensors to which the anomaly is attributed, as `Attribution.tensors` has them."""


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
        history: NormHistory | None = None,
        actions: Actions | None = None,
    ) -> None:
        """``actions`` is told what this rank does; nobody is without."""
        self._actions = actions or Actions.silent()
        self.gradients, self.weights, self.optimizer, self._numbers = gradients, weights, optimizer, numbers
        self.updates_done, self.loss_scale = updates_done, loss_scale
        self.history = history or NormHistory()
        self.idle: list[tuple[Part, Tensor]] = []
        """Parts that nothing moves, in float32 where the parameters are narrower: files shall have all digits."""

    @property
    def scale(self) -> float:
        """Factor on the loss of the coming step."""
        return 1.0 if self.loss_scale is None else self.loss_scale.scale

    def begin(self, num_microbatches: int) -> None:
        """Forget the gradients before a step."""
        self.gradients.begin(num_microbatches)

    def finish(self, loss: float, done: Done) -> Update:
        """Move the weights, unless the numbers are wrong: then they, their moments and all counters stay.

        The caller ends the run where the anomaly says so; NotFiniteError where no loss scale helps.
        """
        self._actions.enter(Kind.GRADIENTS, "adds up the gradients of all ranks")
        scale = self.scale
        norm = self.gradients.reduce_and_norm(scale)
        has_overflowed = self._overflows(loss, norm, done)
        anomaly = None if has_overflowed else self.history.judge(loss, norm, self._numbers.anomalies)
        tensors = {} if anomaly is None else self._tensors(anomaly)
        is_taken = not has_overflowed and (anomaly is None or anomaly.consequence is Consequence.REPORTED)
        rate, decay = self._rate(done), weight_decay(self._counted(done), self._numbers.decay)
        if not has_overflowed:
            self.history = self.history.after(norm, anomaly, self._numbers.anomalies)
        if is_taken:
            self._actions.enter(Kind.OPTIMIZER, "moves the weights")
            self.gradients.clip_(norm, self._numbers.clip_norm)
            step_(self.optimizer, rate=rate, weight_decay=decay)
            self._actions.enter(Kind.GRADIENTS, "brings moved weights to all ranks")
            self.weights.publish()
            self.updates_done += 1
        return Update(norm, rate, decay, scale, not is_taken, anomaly, tensors)

    def _overflows(self, loss: float, norm: float, done: Done) -> bool:
        """Whether a step in float16 has overflowed; the loss scale is the next step's."""
        if self.loss_scale is None:
            return False
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        self.loss_scale = self._next_scale(self.loss_scale, is_finite, done)
        return not is_finite

    def _tensors(self, anomaly: Anomaly) -> dict[str, float | None]:
        """Tensors with the largest shares of a spike's squares, or those whose gradients are not finite."""
        squares = dict(zip(self.gradients.names, self.gradients.squares().tolist(), strict=True))
        if not anomaly.is_spike:
            return {name: None for name, square in squares.items() if not math.isfinite(square)}
        largest = sorted(squares, key=squares.__getitem__, reverse=True)[:_MOST_TENSORS]
        total = sum(squares.values())
        return {name: squares[name] / total for name in largest}

    def _next_scale(self, scale: LossScale, is_finite: bool, done: Done) -> LossScale:
        assert self._numbers.loss_scale is not None
        following = scale.after(is_finite, self._numbers.loss_scale)
        if following.is_hopeless(self._numbers.loss_scale):
            raise NotFiniteError(
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
