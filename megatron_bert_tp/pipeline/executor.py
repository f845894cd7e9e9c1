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
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_bert_tp.parallel.mesh import Axis, Channels
from megatron_bert_tp.parallel.weight_gradients import WeightGradients, Work
from megatron_bert_tp.pipeline.instructions import (
    Await,
    Compute,
    Instruction,
    Launch,
    Phase,
    Program,
    Transfer,
    input_transfer,
    output_transfer,
)
from megatron_bert_tp.pipeline.placement import Placement

BatchT = TypeVar("BatchT")
ContraBatchT = TypeVar("ContraBatchT", contravariant=True)


class Stage(Protocol[ContraBatchT]):
    """A part of the model: hidden states of the stage before (None on the first) to its own output."""

    dtype: torch.dtype
    weight_gradients: WeightGradients

    def __call__(self, received: Tensor | None, batch: ContraBatchT) -> Any:
        """Output of this stage: hidden states, or on the last stage whatever the criterion reads."""

    def boundary_shape(self, batch: ContraBatchT) -> tuple[int, ...]:
        """Shape of the hidden states that cross a boundary for this microbatch."""


Criterion = Callable[[Any, BatchT], tuple[Tensor, Tensor]]
"""Last stage's output and its microbatch to (loss to differentiate, statistics to report)."""
Observe = Callable[[Instruction | None], None]
"""What is told the instruction that comes next, and None when there is none any more."""


@dataclass(frozen=True)
class _Alive:
    """What a backward needs of its forward: the leaf that was received, and the place in the graph to begin at.

    The output itself is not here: the stage that gets it has its own copy.  ``grad`` is the gradient of a loss,
    which nobody sends.  ``output`` is None where nothing before it learns.
    """

    received: Tensor | None
    output: GradientEdge | None
    grad: Tensor | None = None


@dataclass
class _Flight(Generic[BatchT]):
    """What one run holds: tensors between their making and their last use."""

    batches: Sequence[BatchT]
    trains: bool
    loss_scale: float
    received: dict[Transfer, Tensor] = field(default_factory=dict)
    outgoing: dict[Transfer, Tensor] = field(default_factory=dict)
    works: dict[Transfer, dist.Work] = field(default_factory=dict)
    alive: dict[tuple[int, int], _Alive] = field(default_factory=dict)
    deferred: dict[tuple[int, int], list[Work]] = field(default_factory=dict)
    statistics: list[Tensor] = field(default_factory=list)


class Executor(Generic[BatchT]):
    """Runs programs on one rank of the pipeline axis, which holds ``stages``, one for each of its chunks.

    ``channels`` have a communicator for each neighbour on ``axis`` and each direction.  ``observe`` is told each
    instruction before it is carried out, and None when a program is over.
    """

    def __init__(
        self,
        stages: Sequence[Stage[BatchT]],
        criterion: Criterion[BatchT],
        *,
        placement: Placement,
        axis: Axis,
        channels: Channels,
        device: torch.device,
        observe: Observe | None = None,
    ) -> None:
        self._stages, self._criterion, self._placement = stages, criterion, placement
        self._axis, self._channels, self._device = axis, channels, device
        self._observe = observe

    def run(self, program: Program, batches: Sequence[BatchT], *, loss_scale: float = 1.0) -> list[Tensor]:
        """Walk ``program`` over the microbatches; gradients, times ``loss_scale``, add up in the parameters.

        Returns the criterion's statistics, one per microbatch in order, on the last stage; else nothing.
        Without a backward in the program nothing is kept for one.
        """
        trains = any(isinstance(step, Compute) and step.phase is not Phase.FORWARD for step in program)
        flight = _Flight(batches, trains, loss_scale)
        with torch.set_grad_enabled(trains):
            for instruction in program:
                if self._observe is not None:
                    self._observe(instruction)
                match instruction:
                    case Compute(Phase.FORWARD):
                        self._forward(flight, instruction)
                    case Compute(Phase.WEIGHT_GRADIENT, microbatch, chunk):
                        _do_all(flight.deferred.pop((microbatch, chunk)))
                    case Compute():
                        self._backward(flight, instruction)
                    case Launch(transfers):
                        self._launch(flight, transfers)
                    case Await(transfers):
                        self._await(flight, transfers)
        if self._observe is not None:
            self._observe(None)
        return flight.statistics

    def _forward(self, flight: _Flight[BatchT], compute: Compute) -> None:
        batch = flight.batches[compute.microbatch]
        received = self._take(flight, compute)
        if received is not None and flight.trains:
            received.requires_grad_()
        output, grad = self._stages[compute.chunk](received, batch), None
        if output_transfer(compute, self._axis.rank, self._placement) is None:
            output, statistics = self._criterion(output, batch)
            flight.statistics.append(statistics)
            grad = torch.full_like(output, flight.loss_scale)
        else:
            self._hand_on(flight, compute, output.detach())
        if flight.trains:
            edge = get_gradient_edge(output) if output.requires_grad else None
            flight.alive[compute.microbatch, compute.chunk] = _Alive(received, edge, grad)

    def _backward(self, flight: _Flight[BatchT], compute: Compute) -> None:
        """The joint backward, or the input gradient alone with the weights' products put off."""
        key = compute.microbatch, compute.chunk
        alive = flight.alive.pop(key)
        grad = self._take(flight, compute) if alive.grad is None else alive.grad
        if alive.output is None:
            flight.deferred[key] = []
        elif compute.phase is Phase.INPUT_GRADIENT:
            with self._stages[compute.chunk].weight_gradients.put_off() as flight.deferred[key]:
                torch.autograd.backward(alive.output, grad)
        else:
            torch.autograd.backward(alive.output, grad)
        if alive.received is not None:
            sent = alive.received.grad
            assert sent is not None, f"microbatch {compute.microbatch}: the stage does not use what it received"
            self._hand_on(flight, compute, sent)

    def _take(self, flight: _Flight[BatchT], compute: Compute) -> Tensor | None:
        """What this pass receives; nothing at the end of the pipeline where the pass begins."""
        transfer = input_transfer(compute, self._axis.rank, self._placement)
        return None if transfer is None else flight.received.pop(transfer)

    def _hand_on(self, flight: _Flight[BatchT], compute: Compute, tensor: Tensor) -> None:
        """Keep the tensor for its `Launch`, or give it to the next stage, where that is on this rank too."""
        transfer = output_transfer(compute, self._axis.rank, self._placement)
        assert transfer is not None
        (flight.received if transfer.is_local else flight.outgoing)[transfer] = tensor.contiguous()

    def _launch(self, flight: _Flight[BatchT], transfers: Sequence[Transfer]) -> None:
        for transfer in transfers:
            work = self._start(flight, transfer)
            assert work is not None, "this rank is one end of the message"
            flight.works[transfer] = work

    def _start(self, flight: _Flight[BatchT], transfer: Transfer) -> dist.Work | None:
        group = self._channels[transfer.source, transfer.target]
        if transfer.source == self._axis.rank:
            return dist.isend(flight.outgoing[transfer], self._axis.ranks[transfer.target], group)
        stage = self._stages[transfer.chunk]
        shape = stage.boundary_shape(flight.batches[transfer.microbatch])
        buffer = torch.empty(shape, dtype=stage.dtype, device=self._device)
        flight.received[transfer] = buffer
        return dist.irecv(buffer, self._axis.ranks[transfer.source], group)

    def _await(self, flight: _Flight[BatchT], transfers: Sequence[Transfer]) -> None:
        for transfer in transfers:
            flight.works.pop(transfer).wait()
            flight.outgoing.pop(transfer, None)


def _do_all(works: list[Work]) -> None:
    """Each piece of work in its order, and no longer held once it is done."""
    works.reverse()
    while works:
        works.pop()()
