"""Pipeline schedules as data: which stage computes what in which order, and the messages that this implies.

A schedule is a pure function that gives one stage's order of forward and backward passes.
`add_messages` turns the orders of all stages into programs, and those very programs are run by the
executor, checked by `simulate` and drawn by `timeline`.  Nothing here imports torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from typing import Protocol, TypeAlias

from megatron_bert_tp.errors import ScheduleError


class Phase(Enum):
    """Direction of a pass through the stages."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class Compute:
    """One forward or backward pass of one microbatch through one (virtual) stage.

    ``chunk`` says which of this rank's virtual stages; it is 0 where a rank holds one stage.
    """

    phase: Phase
    microbatch: int
    chunk: int = 0


@dataclass(frozen=True)
class Transfer:
    """One message: hidden states going forward, or their gradient going backward.

    ``source`` and ``target`` are ranks on the pipeline axis, ``chunk`` belongs to the receiving
    (virtual) stage.  A transfer sent by one rank and the equal one received by another are the same message.
    """

    phase: Phase
    microbatch: int
    chunk: int
    source: int
    target: int


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


class Schedule(Protocol):
    """A pure function that gives the order of one stage (from 0)."""

    def __call__(self, stage: int, *, num_stages: int, num_microbatches: int) -> Order:
        """Passes of ``stage``, in the order in which it computes them."""


def _passes(phase: Phase, microbatches: range) -> Order:
    return tuple(Compute(phase, microbatch) for microbatch in microbatches)


def gpipe(stage: int, *, num_stages: int, num_microbatches: int) -> Order:  # noqa: ARG001
    """All forwards, then all backwards (Huang et al. 2019, "GPipe"), both in ascending order.

    Every stage keeps the activations of all microbatches.  Backwards ascend, where the paper's figure
    descends, so that gradients are added in the same order under every schedule.
    """
    microbatches = range(num_microbatches)
    return _passes(Phase.FORWARD, microbatches) + _passes(Phase.BACKWARD, microbatches)


def one_f_one_b(stage: int, *, num_stages: int, num_microbatches: int) -> Order:
    """Warm-up forwards, then forward and backward in turn, then the backwards that are left.

    Known as PipeDream-flush or 1F1B (Narayanan et al. 2021, section 2.2).  As long as GPipe, but a stage
    keeps the activations of at most ``min(num_stages - stage, num_microbatches)`` microbatches.
    """
    num_warmup = min(num_stages - stage - 1, num_microbatches)
    forwards = _passes(Phase.FORWARD, range(num_microbatches))
    backwards = _passes(Phase.BACKWARD, range(num_microbatches))
    turns = chain.from_iterable(zip(forwards[num_warmup:], backwards, strict=False))
    return (*forwards[:num_warmup], *turns, *backwards[num_microbatches - num_warmup :])


def forward_only(stage: int, *, num_stages: int, num_microbatches: int) -> Order:  # noqa: ARG001
    """Forwards alone, in ascending order: evaluation and prediction."""
    return _passes(Phase.FORWARD, range(num_microbatches))


ORDERS: dict[str, Schedule] = {"gpipe": gpipe, "1f1b": one_f_one_b, "forward_only": forward_only}


def programs(name: str, num_stages: int, num_microbatches: int) -> tuple[Program, ...]:
    """Programs of all stages, messages included, for the schedule ``name`` of `ORDERS`.

    Raises ScheduleError for an unknown name and for fewer than one stage or microbatch.
    """
    if name not in ORDERS:
        raise ScheduleError(f"unknown schedule {name!r}; choose one of {', '.join(ORDERS)}")
    for value, meaning in ((num_stages, "stages"), (num_microbatches, "microbatches")):
        if value < 1:
            raise ScheduleError(f"a pipeline needs at least one of its {meaning}, got {value}; use 1 or more")
    order = ORDERS[name]
    return add_messages(
        [order(s, num_stages=num_stages, num_microbatches=num_microbatches) for s in range(num_stages)]
    )


def add_messages(orders: Sequence[Order]) -> tuple[Program, ...]:
    """Programs of all stages from their orders: in each gap, one `Launch` and its `Await`.

    The gap before a pass holds the send of what the pass before it produced and the receive of what
    this pass needs.  They start together, since two neighbours that both wait for their own
    send first would wait for ever.  One stage gets its order back, without messages.
    """
    return tuple(tuple(_with_messages(order, stage, len(orders))) for stage, order in enumerate(orders))


def _with_messages(order: Order, stage: int, num_stages: int) -> Iterator[Instruction]:
    produced: tuple[Transfer, ...] = ()
    for compute in order:
        yield from _exchange(produced + input_transfers(compute, stage, num_stages))
        yield compute
        produced = output_transfers(compute, stage, num_stages)
    yield from _exchange(produced)


def _exchange(transfers: tuple[Transfer, ...]) -> tuple[Instruction, ...]:
    return (Launch(transfers), Await(transfers)) if transfers else ()


def input_transfers(compute: Compute, stage: int, num_stages: int) -> tuple[Transfer, ...]:
    """What ``stage`` must receive before ``compute``: empty at the end where the pass begins, else one."""
    source = stage - _step(compute.phase)
    return _between(compute, source, stage) if 0 <= source < num_stages else ()


def output_transfers(compute: Compute, stage: int, num_stages: int) -> tuple[Transfer, ...]:
    """What ``stage`` must send after ``compute``: empty at the end where the pass finishes, else one."""
    target = stage + _step(compute.phase)
    return _between(compute, stage, target) if 0 <= target < num_stages else ()


def _step(phase: Phase) -> int:
    return 1 if phase is Phase.FORWARD else -1


def _between(compute: Compute, source: int, target: int) -> tuple[Transfer, ...]:
    return (Transfer(compute.phase, compute.microbatch, compute.chunk, source, target),)
