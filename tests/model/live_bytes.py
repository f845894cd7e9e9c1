"""Bytes that are alive for a backward, counted from outside: what autograd saves, and what deferred work holds."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.model.memory import Layout
from megatron_bert_tp.model.microbatch_sizes import Microbatch
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.weight_gradients import WeightGradients, Work
from megatron_bert_tp.pipeline.instructions import Instruction
from megatron_bert_tp.pipeline.partition import StagePlan
from tests.model.stages import Model, Way, built, loss_of


@dataclass(eq=False)
class Held:
    """A tensor for as long as the graph that saved it."""

    tensor: Tensor


class LiveBytes:
    """Distinct storages that are saved for a backward or wait for a weight gradient; parameters do not count."""

    def __init__(self, *modules: nn.Module) -> None:
        self._saved: WeakSet[Held] = WeakSet()
        self._works: WeakSet[Any] = WeakSet()
        self._parameters: set[int] = set()
        for module in modules:
            self.leave_out(module)

    def leave_out(self, module: nn.Module) -> None:
        self._parameters |= {p.untyped_storage().data_ptr() for p in module.parameters()}

    @contextmanager
    def watching(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._save, lambda held: held.tensor):
            yield

    def _save(self, tensor: Tensor) -> Held:
        # Detached, as autograd saves an output itself: with its graph it would hold itself for ever.
        held = Held(tensor.detach())
        self._saved.add(held)
        return held

    def put_off(self, works: Sequence[Work]) -> None:
        for work in works:
            self._works.add(work)

    def storages(self) -> dict[int, int]:
        """Address and bytes of every storage that is alive."""
        tensors = [held.tensor for held in self._saved]
        tensors += [tensor for work in self._works for tensor in tensors_in(work)]
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return {address: size for address, size in found.items() if address not in self._parameters}

    @property
    def total(self) -> int:
        return sum(self.storages().values())


def tensors_in(work: Any) -> list[Tensor]:
    """Tensors that a deferred work holds, in whatever it is bound to."""
    if isinstance(work, Tensor):
        return [work]
    if isinstance(work, partial):
        return [tensor for each in (work.func, *work.args) for tensor in tensors_in(each)]
    if isinstance(work, tuple | list):
        return [tensor for each in work for tensor in tensors_in(each)]
    return []


class WatchedGradients(WeightGradients):
    """Tells of the work that is put off."""

    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self._live = live

    @contextmanager
    def put_off(self) -> Iterator[list[Work]]:
        with super().put_off() as works:
            yield works
        self._live.put_off(works)


class Watched(tuple[Instruction, ...]):
    """A program that calls ``after`` with the instruction that has just been carried out."""

    after: Callable[[Instruction], None]

    def __iter__(self) -> Iterator[Instruction]:
        for instruction in super().__iter__():
            yield instruction
            self.after(instruction)


def watched(program: Iterable[Instruction], after: Callable[[Instruction], None]) -> Watched:
    made = Watched(program)
    made.after = after
    return made


def sizes_of(batch: Batch) -> Microbatch:
    """What the formula knows of a microbatch."""
    samples, sequence = batch.input_ids.shape
    masked = len(batch.masked_positions)
    if batch.packed_lengths is not None:
        return Microbatch.of_packed(batch.packed_lengths, sequence, masked=masked)
    return Microbatch.of_rows(samples, sequence, masked=masked, is_padded=batch.attention_mask is not None)


def layout_of(model: Model, way: Way) -> Layout:
    return Layout(
        shape=model.shape,
        element_bytes=model.dtype.itemsize,
        tensor=way.tensor,
        splits_sequence=way.splits_sequence,
        recompute=way.recompute,
    )


def received_by(stage: MegatronBertStage, batch: Batch) -> Tensor | None:
    """Stands for what the stage before sends."""
    if stage.plan.is_first:
        return None
    received = torch.linspace(-1, 1, stage.shape.hidden_size, dtype=stage.dtype)
    return received.expand(stage.boundary_shape(batch)).contiguous().requires_grad_()


def saved_sizes(model: Model, way: Way, axis: Axis, plan: StagePlan, batch: Batch) -> list[int]:
    """Bytes of every storage that one microbatch keeps for its backward, ascending."""
    stage = built(model, way, axis, plan)
    live = LiveBytes(stage)
    with live.watching():
        output = stage(received_by(stage, batch), batch)
        result = loss_of(stage, output, batch) if plan.is_last else output
        del output
    sizes = sorted(live.storages().values())
    del result
    return sizes
