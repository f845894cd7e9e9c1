"""The one loop that runs a pipeline program: forward, backward, launch, await.

It knows neither BERT nor losses: a `Stage` computes, a `Criterion` turns the last stage's output into a loss.
One stage is a program without messages, which is gradient accumulation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.pipeline.schedule import Await, Compute, Launch, Phase, Program, Transfer

BatchT = TypeVar("BatchT")
ContraBatchT = TypeVar("ContraBatchT", contravariant=True)


class Stage(Protocol[ContraBatchT]):
    """A part of the model: hidden states of the stage before (None on the first) to its own output."""

    dtype: torch.dtype

    def __call__(self, received: Tensor | None, batch: ContraBatchT) -> Any:
        """Output of this stage: hidden states, or on the last stage whatever the criterion reads."""

    def boundary_shape(self, batch: ContraBatchT) -> tuple[int, ...]:
        """Shape of the hidden states that cross a boundary for this microbatch."""


Criterion = Callable[[Any, BatchT], tuple[Tensor, Tensor]]
"""Last stage's output and its microbatch to (loss to differentiate, statistics to report)."""


@dataclass
class _Flight(Generic[BatchT]):
    """What one run holds: tensors between their making and their last use."""

    batches: Sequence[BatchT]
    trains: bool
    received: dict[Transfer, Tensor] = field(default_factory=dict)
    outgoing: dict[Transfer, Tensor] = field(default_factory=dict)
    works: dict[Transfer, dist.Work] = field(default_factory=dict)
    alive: dict[int, tuple[Tensor | None, Tensor]] = field(default_factory=dict)
    statistics: list[Tensor] = field(default_factory=list)


class Executor(Generic[BatchT]):
    """Runs programs on one rank of the pipeline axis."""

    def __init__(
        self, stage: Stage[BatchT], criterion: Criterion[BatchT], *, axis: Axis, device: torch.device
    ) -> None:
        self._stage, self._criterion, self._axis, self._device = stage, criterion, axis, device

    def run(self, program: Program, batches: Sequence[BatchT]) -> list[Tensor]:
        """Walk ``program`` over the microbatches; gradients add up in the parameters.

        Returns the criterion's statistics, one per microbatch in order, on the last stage; else nothing.
        Without a backward in the program nothing is kept for one.
        """
        trains = any(isinstance(step, Compute) and step.phase is Phase.BACKWARD for step in program)
        flight = _Flight(batches, trains)
        with torch.set_grad_enabled(trains):
            for instruction in program:
                match instruction:
                    case Compute(Phase.FORWARD, microbatch, chunk):
                        self._forward(flight, microbatch, chunk)
                    case Compute(Phase.BACKWARD, microbatch, chunk):
                        self._backward(flight, microbatch, chunk)
                    case Launch(transfers):
                        self._launch(flight, transfers)
                    case Await(transfers):
                        self._await(flight, transfers)
        return flight.statistics

    def _forward(self, flight: _Flight[BatchT], microbatch: int, chunk: int) -> None:
        batch = flight.batches[microbatch]
        received = self._take(flight, Phase.FORWARD, microbatch, chunk, step=1)
        if received is not None and flight.trains:
            received.requires_grad_()
        output = self._stage(received, batch)
        if self._axis.is_last:
            output, statistics = self._criterion(output, batch)
            flight.statistics.append(statistics)
        else:
            self._send(flight, Phase.FORWARD, microbatch, chunk, step=1, tensor=output.detach())
        if flight.trains:
            flight.alive[microbatch] = received, output

    def _backward(self, flight: _Flight[BatchT], microbatch: int, chunk: int) -> None:
        grad = self._take(flight, Phase.BACKWARD, microbatch, chunk, step=-1)
        received, output = flight.alive.pop(microbatch)
        torch.autograd.backward(output, grad)
        if received is not None:
            assert received.grad is not None, f"microbatch {microbatch}: the stage does not use what it received"
            self._send(flight, Phase.BACKWARD, microbatch, chunk, step=-1, tensor=received.grad)

    def _take(
        self, flight: _Flight[BatchT], phase: Phase, microbatch: int, chunk: int, *, step: int
    ) -> Tensor | None:
        """What this pass receives; nothing at the end of the axis where the pass begins."""
        place = self._axis.rank
        if not 0 <= place - step < self._axis.size:
            return None
        return flight.received.pop(Transfer(phase, microbatch, chunk, place - step, place))

    def _send(
        self, flight: _Flight[BatchT], phase: Phase, microbatch: int, chunk: int, *, step: int, tensor: Tensor
    ) -> None:
        place = self._axis.rank
        flight.outgoing[Transfer(phase, microbatch, chunk, place, place + step)] = tensor.contiguous()

    def _launch(self, flight: _Flight[BatchT], transfers: Sequence[Transfer]) -> None:
        operations = [self._operation(flight, transfer) for transfer in transfers]
        works = dist.batch_isend_irecv(operations)
        # NCCL gives one handle for the whole group, gloo one for each message.
        assert len(works) in (1, len(transfers)), f"{len(works)} handles for {len(transfers)} messages"
        handles = works if len(works) == len(transfers) else works * len(transfers)
        flight.works.update(zip(transfers, handles, strict=True))

    def _operation(self, flight: _Flight[BatchT], transfer: Transfer) -> dist.P2POp:
        if transfer.source == self._axis.rank:
            peer = self._axis.ranks[transfer.target]
            return dist.P2POp(dist.isend, flight.outgoing[transfer], peer, self._axis.group)
        shape = self._stage.boundary_shape(flight.batches[transfer.microbatch])
        buffer = torch.empty(shape, dtype=self._stage.dtype, device=self._device)
        flight.received[transfer] = buffer
        return dist.P2POp(dist.irecv, buffer, self._axis.ranks[transfer.source], self._axis.group)

    def _await(self, flight: _Flight[BatchT], transfers: Sequence[Transfer]) -> None:
        for transfer in transfers:
            flight.works.pop(transfer).wait()
            flight.outgoing.pop(transfer, None)
