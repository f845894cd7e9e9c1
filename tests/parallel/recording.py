"""Every call of `torch.distributed` on one rank, written down as it passes: kind, axis, phase, size, peer."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert_tp.parallel.gradients import Gradients
from megatron_bert_tp.parallel.mesh import ParallelMesh
from megatron_bert_tp.pipeline.executor import Executor
from megatron_bert_tp.pipeline.instructions import Phase, Transfer
from megatron_bert_tp.training.trainer import Trainer
from megatron_bert_tp.training.update import Updater
from tests.support import Layout, Recipe
from tests.trainers import CORPUS_SHAPE, configure, trainer_of

RECIPE = Recipe(shape=CORPUS_SHAPE, clip_norm=0.5)
AXES = ("data", "pipeline", "tensor", "tied")
# Two names of one function each: torch 2.13 has new ones.
KINDS = {
    "all_gather_single": "gather",
    "all_gather_into_tensor": "gather",
    "reduce_scatter_single": "scatter",
    "reduce_scatter_tensor": "scatter",
}
# What a call in this function belongs to; the innermost counts.
PHASES = (
    (Trainer, "train_step", "count"),
    (Trainer, "_run", "report"),
    (Executor, "run", "weights"),
    (Executor, "_forward", "forward"),
    (torch.autograd, "backward", "backward"),
    (Updater, "finish", "update"),
    (Gradients, "reduce_and_norm", "gradients"),
)
MESSAGES = {Phase.FORWARD: "hidden states", Phase.BACKWARD: "gradient"}


@dataclass(frozen=True)
class Case:
    """A layout, the recipe that it runs, and further settings."""

    layout: Layout
    recipe: Recipe = RECIPE
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Call:
    """One message of one rank.

    ``axis`` is the name of its communicator, and ``phase`` the part of the step, or for messages between stages
    what they carry.  ``elements`` are those of the whole tensor, also where a rank has a share of it; ``peer`` is
    the global rank on the other side of a send or a receive.
    """

    kind: str
    axis: str
    phase: str
    elements: int
    dtype: str
    peer: int | None = None

    @property
    def num_bytes(self) -> int:
        return self.elements * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Event:
    """A call in its place in the sequence, and which message of the schedule it is, if any."""

    call: Call
    transfer: Transfer | None


def functions_that_talk() -> list[str]:
    """Everything in `torch.distributed` that takes a group and does more than ask about it, and what makes one."""
    found = ["batch_isend_irecv", "new_group"]
    for name in dir(dist):
        function = vars(dist).get(name)
        is_question = name.startswith(("_", "get_", "is_", "destroy_"))
        if not is_question and inspect.isfunction(function) and "group" in inspect.signature(function).parameters:
            found.append(name)
    return found


def axis_names(mesh: ParallelMesh) -> dict[int, str]:
    """The axis of each communicator of a rank, by the identity of the group."""
    axes = [getattr(mesh, name) for name in AXES]
    channels = {id(group): "channel" for group in mesh.channels.values()}
    return channels | {id(axis.group): axis.name for axis in axes if axis.group}


class Recorder:
    """Stands between the package and `torch.distributed`; ``names`` are those of groups by identity."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self.events: list[Event] = []
        self._names = names
        self._phase, self._transfer = "before", None

    @property
    def calls(self) -> list[Call]:
        return [event.call for event in self.events]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """All calls of this process are recorded, and done."""
        with ExitStack() as patches:
            for name in functions_that_talk():
                patches.enter_context(patch.object(dist, name, self._recorded(name, getattr(dist, name))))
            for owner, name, phase in PHASES:
                patches.enter_context(patch.object(owner, name, self._marked(phase, getattr(owner, name))))
            patches.enter_context(patch.object(Executor, "_start", self._marked_start(Executor._start)))
            yield

    @contextmanager
    def _in(self, phase: str, transfer: Transfer | None = None) -> Iterator[None]:
        before = self._phase, self._transfer
        self._phase, self._transfer = phase, transfer
        try:
            yield
        finally:
            self._phase, self._transfer = before

    def _marked(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._in(phase):
                return function(*args, **kwargs)

        return call

    def _marked_start(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(executor: object, flight: object, transfer: Transfer) -> Any:
            with self._in(MESSAGES[transfer.phase], transfer):
                return function(executor, flight, transfer)

        return call

    def _recorded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._write(name, signature.bind(*args, **kwargs).arguments)
            return function(*args, **kwargs)

        return call

    def _write(self, name: str, given: Mapping[str, Any]) -> None:
        kind = KINDS.get(name, name)
        if name == "all_reduce":
            kind = {dist.ReduceOp.SUM: "sum", dist.ReduceOp.MAX: "maximum"}[given.get("op", dist.ReduceOp.SUM)]
        group = given.get("group")
        axis = "world" if group is None else self._names.get(id(group), "another group")
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        whole = max(tensors, key=Tensor.numel, default=torch.empty(0))
        dtype, peer = str(whole.dtype).removeprefix("torch."), given.get("dst", given.get("src"))
        call = Call(kind, axis, self._phase, whole.numel(), dtype, peer)
        self.events.append(Event(call, self._transfer))


def calls_of_step(settings: Path, case: Case) -> list[Call]:
    """The second step of training on this rank, as the trainer takes it: a function that the pool runs."""
    trainer = trainer_of(configure(settings, case.recipe, case.layout, *case.overrides), case.layout)
    trainer.train_step()
    recorder = Recorder(axis_names(trainer.mesh))
    with recorder.listening():
        trainer.train_step()
    return recorder.calls
