"""Faults in the numbers of a step: an element of an activation, a gradient, a loss or a weight of some rank."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bert_tp.errors import MegatronBertError
from megatron_bert_tp.objectives.pretraining import microbatch_loss
from megatron_bert_tp.training.anomalies import AnomalyReport
from megatron_bert_tp.training.state import held_rectangles
from megatron_bert_tp.training.trainer import Trainer
from tests.support import Layout, Recipe
from tests.trainers import configure, trainer_of


@dataclass(frozen=True)
class Spoil:
    """What goes wrong on one rank in steps ``steps`` (from 1), in the microbatch with ``sample`` or in all."""

    what: str
    name: str
    rank: int = 0
    steps: tuple[int, ...] = (2,)
    value: float = torch.nan
    sample: int | None = None
    times: int = 10**6
    """How often: a fault that happens once is not there when the step is computed again."""


@dataclass(frozen=True)
class Outcome:
    """What a rank has seen of a run."""

    reports: list[AnomalyReport]
    error: str | None
    error_kind: str | None
    num_steps: int
    skipped: list[bool]
    losses: list[float]
    weights: list[Tensor]
    """At the end."""
    moved: list[bool]
    """Whether a step has changed anything that it may."""
    counters: tuple[int, frozenset[float]]


def state_of(trainer: Trainer) -> list[Tensor]:
    """Copies of all that a step may move: parameters, masters, moments."""
    held = held_rectangles(trainer.chunks, trainer.updater, "adamw", trainer.mesh)
    own = [each.weight for each in trainer.updater.weights.owned]
    moments = [value for state in trainer.updater.optimizer.state.values() for value in state.values()]
    parameters = [p.detach() for stage in trainer.chunks for p in stage.parameters()]
    return [tensor.clone() for tensor in (*parameters, *own, *moments, *(each.tensor for each in held))]


class Spoiler:
    """Carries a `Spoil` out on its rank."""

    def __init__(self, spoil: Spoil, trainer: Trainer) -> None:
        self._spoil, self._trainer, self._left = spoil, trainer, spoil.times
        self._batch: Any = None

    def install(self) -> ExitStack:
        stack, forward_hooks = ExitStack(), {"output": self._output, "gradient": self._gradient}
        if dist.get_rank() != self._spoil.rank:
            return stack
        for stage in self._trainer.chunks:
            stage.register_forward_pre_hook(self._begin)
            for name, module in stage.named_modules():
                if name == self._spoil.name:
                    module.register_forward_hook(forward_hooks[self._spoil.what])
            for name, parameter in stage.named_parameters():
                if name == self._spoil.name:
                    self._of_parameter(stage, name, parameter)
        if self._spoil.what == "loss":
            stack.enter_context(patch("megatron_bert_tp.objectives.pretraining.microbatch_loss", self._loss))
        return stack

    def _of_parameter(self, stage: nn.Module, _name: str, parameter: nn.Parameter) -> None:
        def spoil_weight(*_arguments: object) -> None:
            if self._is_now():
                parameter.data.view(-1)[-1] = self._spoil.value  # past autograd, as a flipped bit would come

        if self._spoil.what == "weight":
            stage.register_forward_pre_hook(spoil_weight)
        elif self._spoil.what == "weight gradient":
            parameter.register_hook(lambda gradient: None if gradient is None else self._spoilt(gradient))

    def _begin(self, _stage: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._batch = arguments[1]

    def _is_now(self) -> bool:
        spoil = self._spoil
        is_step = self._trainer.steps_done + 1 in spoil.steps and self._trainer.chunks.is_training
        is_sample = spoil.sample is None or spoil.sample in self._batch.sample_numbers
        is_here = is_step and is_sample and self._left > 0
        self._left -= is_here
        return is_here

    def _spoilt(self, tensor: Tensor) -> Tensor:
        if not self._is_now():
            return tensor
        return self._changed(tensor)

    def _changed(self, tensor: Tensor) -> Tensor:
        mask = torch.zeros_like(tensor, dtype=torch.bool)
        mask.view(-1)[3] = True
        return tensor.masked_fill(mask, self._spoil.value)

    def _output(self, _module: nn.Module, _arguments: object, output: Tensor) -> Tensor:
        return self._spoilt(output)

    def _gradient(self, _module: nn.Module, _arguments: object, output: Tensor) -> None:
        if self._is_now():
            output.register_hook(self._changed)

    def _loss(self, *arguments: Any, **more: Any) -> tuple[Tensor, Tensor]:
        loss, statistics = microbatch_loss(*arguments, **more)
        return (loss * self._spoil.value, statistics * self._spoil.value) if self._is_now() else (loss, statistics)


def train_spoilt(
    settings: Path, recipe: Recipe, layout: Layout, spoil: Spoil | None, *overrides: str
) -> Outcome:
    """The steps of a rank: a function that the pool runs."""
    trainer = trainer_of(configure(settings, recipe, layout, *overrides), layout)
    reports: list[AnomalyReport] = []
    trainer.on_anomaly = reports.append
    outcome: dict[str, Any] = {"error": None, "error_kind": None}
    skipped, losses, moved = [], [], []
    with Spoiler(spoil, trainer).install() if spoil else ExitStack():
        while trainer.steps_done < recipe.num_steps:
            before = state_of(trainer)
            try:
                step = trainer.train_step()
            except MegatronBertError as error:
                outcome = {"error": str(error), "error_kind": type(error).__name__}
            after = state_of(trainer)
            moved.append(not all(map(same_bits, before, after)))
            if outcome["error"] is not None:
                break
            skipped.append(step.update.is_skipped)
            losses.append(step.losses.loss)
    optimizer = trainer.updater.optimizer
    counters = trainer.updater.updates_done, frozenset(float(s["step"]) for s in optimizer.state.values())
    return Outcome(
        reports,
        num_steps=trainer.steps_done,
        skipped=skipped,
        losses=losses,
        weights=state_of(trainer),
        moved=moved,
        counters=counters,
        **outcome,
    )


def train_without_step(settings: Path, recipe: Recipe, layout: Layout, left_out: int, *overrides: str) -> Outcome:
    """A run in which a step is passed over: its samples are gone, and nothing is computed."""
    trainer = trainer_of(configure(settings, recipe, layout, *overrides), layout)
    losses = []
    while trainer.steps_done < recipe.num_steps:
        if trainer.steps_done + 1 == left_out:
            trainer.steps_done += 1
            trainer.samples_done += trainer.pace.batch.global_batch_at(trainer.samples_done)
        else:
            losses.append(trainer.train_step().losses.loss)
    return Outcome([], None, None, trainer.steps_done, [], losses, state_of(trainer), [], (0, frozenset()))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """NaN equals itself here."""
    return one.detach().numpy().tobytes() == other.detach().numpy().tobytes()
