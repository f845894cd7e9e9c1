"""What a pipeline program consists of: passes, messages, and which message a pass needs or gives."""

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from megatron_bert_tp.pipeline.placement import Placement


class Phase(Enum):
    """Kind of a pass through one (virtual) stage.

    A backward is either one joint pass, or two: the input gradient, which the stage before waits for, and
    the weight gradient, which nobody waits for and which comes at any later time.
    """

    FORWARD = "forward"
    BACKWARD = "backward"
    INPUT_GRADIENT = "input gradient"
    WEIGHT_GRADIENT = "weight gradient"


@dataclass(frozen=True)
class Compute:
    """One pass of one microbatch through one (virtual) stage.

    ``chunk`` says which of this rank's virtual stages; it is 0 where a rank holds one stage.
    """

    phase: Phase
    microbatch: int
    chunk: int = 0


@dataclass(frozen=True)
class Transfer:
    """One message: hidden states going forward, or their gradient going backward.

    ``phase`` is FORWARD or BACKWARD, ``source`` and ``target`` are ranks on the pipeline axis, and ``chunk``
    belongs to the receiving (virtual) stage.  A transfer sent by one rank and the equal one received by
    another are the same message.  Where both ranks are one, it is handed over without a message.
    """

    phase: Phase
    microbatch: int
    chunk: int
    source: int
    target: int

    @property
    def is_local(self) -> bool:
        """Whether both (virtual) stages are on one rank."""
        return self.source == self.target


@dataclass(frozen=True)
class Launch:
    """Start all these sends and receives together, without waiting for any."""

    transfers: tuple[Transfer, ...]


@dataclass(frozen=True)
class Await:
    """Wait until all these transfers are complete; then receives may be read and sent buffers freed."""

    transfers: tuple[Transfer, ...]


Instruction: TypeAlias = Compute | Launch | Await
Order: TypeAlias = tuple[Compute, ...]
Program: TypeAlias = tuple[Instruction, ...]

# Direction of a pass through the stages, and of the messages that it needs and gives.
_DIRECTIONS = {
    Phase.FORWARD: (1, Phase.FORWARD),
    Phase.BACKWARD: (-1, Phase.BACKWARD),
    Phase.INPUT_GRADIENT: (-1, Phase.BACKWARD),
}


def input_transfer(compute: Compute, rank: int, placement: Placement) -> Transfer | None:
    """What ``rank`` needs before ``compute``; None for a weight gradient and at the end where the pass begins.

    Where ``source`` equals ``target``, the rank itself has made it.
    """
    if compute.phase not in _DIRECTIONS:
        return None
    step, phase = _DIRECTIONS[compute.phase]
    stage = placement.stages[rank][compute.chunk] - step
    if not 0 <= stage < placement.num_stages:
        return None
    return Transfer(phase, compute.microbatch, compute.chunk, placement.place_of(stage)[0], rank)


def output_transfer(compute: Compute, rank: int, placement: Placement) -> Transfer | None:
    """What ``rank`` gives after ``compute``; None for a weight gradient and at the end where the pass finishes.

    Where ``source`` equals ``target``, the rank itself needs it.
    """
    if compute.phase not in _DIRECTIONS:
        return None
    step, phase = _DIRECTIONS[compute.phase]
    stage = placement.stages[rank][compute.chunk] + step
    if not 0 <= stage < placement.num_stages:
        return None
    target, chunk = placement.place_of(stage)
    return Transfer(phase, compute.microbatch, chunk, rank, target)


def describe(transfer: Transfer) -> str:
    """A transfer in words, for messages to people."""
    content = "hidden states" if transfer.phase is Phase.FORWARD else "gradient"
    chunk = f" (chunk {transfer.chunk})" if transfer.chunk else ""
    route = f"from rank {transfer.source} to rank {transfer.target}"
    return f"{content} of microbatch {transfer.microbatch}{chunk} {route}"
