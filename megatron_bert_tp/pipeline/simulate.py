"""Discrete-event simulation of pipeline programs: what runs when, and whether it runs at all.

The transport is the strictest that there is: a transfer completes only when both sides have launched it,
an `Await` blocks until all of its transfers are complete, and messages from one rank to another
arrive in the order in which they were sent.  A program that passes here passes on any backend.  A message takes
its time from the later launch on: it blocks both sides where they await it at once, and runs beside the
passes between `Launch` and `Await` where there are any.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from megatron_bert_tp.errors import ScheduleError
from megatron_bert_tp.pipeline.instructions import Await, Compute, Launch, Phase, Program, Transfer, describe
from megatron_bert_tp.pipeline.messages import check_messages
from megatron_bert_tp.pipeline.placement import Placement


@dataclass(frozen=True)
class Durations:
    """Time of each virtual stage's passes and of a message, all in one unit of the caller's choice.

    ``backward`` is that of the joint pass.  ``weight`` is that of the weight gradient alone, by default half
    of it; ``input_gradient`` that of the input gradient alone, by default what is left of the joint pass.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    transfer: float = 0.0
    weight: tuple[float, ...] | None = None
    input_gradient: tuple[float, ...] | None = None

    @classmethod
    def equal(
        cls,
        num_stages: int,
        *,
        forward: float,
        backward: float,
        weight_share: float = 0.5,
        transfer: float = 0.0,
    ) -> "Durations":
        """The same durations on every stage; ``weight_share`` of a backward is its weight gradient."""
        weight = (backward * weight_share,) * num_stages
        return cls((forward,) * num_stages, (backward,) * num_stages, transfer, weight)

    def check(self, num_stages: int) -> None:
        """Raise ScheduleError unless there is one duration of every kind for each virtual stage."""
        kinds = (self.forward, self.backward, self.weight, self.input_gradient)
        counts = [len(kind) for kind in kinds if kind is not None]
        if any(count != num_stages for count in counts):
            raise ScheduleError(
                f"{num_stages} virtual stages need one duration of each kind for each stage, got {counts}"
            )

    def of(self, phase: Phase, stage: int) -> float:
        """Time that a pass of this kind takes on a virtual stage."""
        joint = self.backward[stage]
        weight = joint / 2 if self.weight is None else self.weight[stage]
        rest = joint - weight if self.input_gradient is None else self.input_gradient[stage]
        return {
            Phase.FORWARD: self.forward[stage],
            Phase.BACKWARD: joint,
            Phase.INPUT_GRADIENT: rest,
            Phase.WEIGHT_GRADIENT: weight,
        }[phase]


@dataclass(frozen=True)
class Interval:
    """When one pass ran."""

    start: float
    end: float
    compute: Compute


# By how much a pass changes what a rank holds: activations, and work for weight gradients that waits.
_LIVE = {Phase.FORWARD: 1, Phase.BACKWARD: -1, Phase.INPUT_GRADIENT: -1}
_DEFERRED = {Phase.INPUT_GRADIENT: 1, Phase.WEIGHT_GRADIENT: -1}


@dataclass(frozen=True)
class Timeline:
    """What ran when: one row of intervals per rank, in ascending time.  Times as in `Durations`."""

    ranks: tuple[tuple[Interval, ...], ...]

    @property
    def length(self) -> float:
        """Time from 0 to the end of the last pass on any rank."""
        return max((row[-1].end for row in self.ranks if row), default=0.0)

    @property
    def idle_share(self) -> float:
        """Share of all ranks' time in which nothing is computed, from 0 to 1: the bubble."""
        available = self.length * len(self.ranks)
        busy = sum(interval.end - interval.start for row in self.ranks for interval in row)
        return (available - busy) / available if available else 0.0

    def peak_live(self, rank: int) -> int:
        """Most pairs of microbatch and chunk whose activations ``rank`` holds at one time.

        They live from the start of their forward to the end of their joint backward or input gradient; those
        of a forward that has no backward (evaluation) end with it.
        """
        if all(interval.compute.phase is Phase.FORWARD for interval in self.ranks[rank]):
            return min(len(self.ranks[rank]), 1)
        return self._peak(rank, _LIVE)

    def peak_deferred(self, rank: int) -> int:
        """Most weight gradients that wait on ``rank`` at one time, each with what it will be made of.

        They wait from the end of the input gradient to the end of their own pass.
        """
        return self._peak(rank, _DEFERRED)

    def _peak(self, rank: int, changes: Mapping[Phase, int]) -> int:
        steps = (changes.get(interval.compute.phase, 0) for interval in self.ranks[rank])
        return max(accumulate(steps, initial=0))


@dataclass
class _Rank:
    """How far one rank has come in its program."""

    number: int
    program: Program
    stages: tuple[int, ...]
    position: int = 0
    clock: float = 0.0
    intervals: list[Interval] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return self.position == len(self.program)


class _Wire:
    """Launch times of all transfers, by side; knows when a transfer is complete."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._launched: dict[Transfer, dict[int, float]] = {}

    def launch(self, transfer: Transfer, *, rank: int, time: float) -> None:
        self._launched.setdefault(transfer, {})[rank] = time

    def missing_sides(self, transfer: Transfer) -> tuple[int, ...]:
        """Ranks that still have to launch ``transfer``."""
        sides: Mapping[int, float] = self._launched.get(transfer, {})
        return tuple(side for side in (transfer.source, transfer.target) if side not in sides)

    def completion(self, transfer: Transfer) -> float:
        return max(self._launched[transfer].values()) + self._seconds


def simulate(programs: Sequence[Program], placement: Placement, durations: Durations) -> Timeline:
    """Timeline of ``programs`` (one per rank) when passes and messages take ``durations``.

    Raises ScheduleError when messages do not match (`check_messages`), and for a deadlock, with each stuck
    rank, the instruction at which it is stuck and what that waits for.
    """
    check_messages(programs, placement)
    durations.check(placement.num_stages)
    ranks = [_Rank(number, program, placement.stages[number]) for number, program in enumerate(programs)]
    wire = _Wire(durations.transfer)
    while any([_advance(rank, wire, durations) for rank in ranks]):  # noqa: C419 - all of them, not the first
        pass
    if not all(rank.is_done for rank in ranks):
        raise ScheduleError(_deadlock(ranks, wire))
    return Timeline(tuple(tuple(rank.intervals) for rank in ranks))


def _advance(rank: _Rank, wire: _Wire, durations: Durations) -> bool:
    """Walk the program up to the next `Await` that is not complete; whether it moved at all."""
    before = rank.position
    while not rank.is_done and _step(rank, wire, durations):
        rank.position += 1
    return rank.position > before


def _step(rank: _Rank, wire: _Wire, durations: Durations) -> bool:
    """Do the instruction at ``rank.position``; False when it has to wait."""
    match rank.program[rank.position]:
        case Launch(transfers):
            for transfer in transfers:
                wire.launch(transfer, rank=rank.number, time=rank.clock)
        case Await(transfers):
            if any(wire.missing_sides(transfer) for transfer in transfers):
                return False
            rank.clock = max([rank.clock, *(wire.completion(transfer) for transfer in transfers)])
        case Compute(phase, _, chunk) as compute:
            start = rank.clock
            rank.clock += durations.of(phase, rank.stages[chunk])
            rank.intervals.append(Interval(start, rank.clock, compute))
    return True


def _deadlock(ranks: Sequence[_Rank], wire: _Wire) -> str:
    stuck = [_stuck(rank, wire) for rank in ranks if not rank.is_done]
    return "\n  ".join(
        [
            "deadlock: these ranks wait for each other for ever; "
            "launch the messages of one gap together, sends and receives",
            *stuck,
        ]
    )


def _stuck(rank: _Rank, wire: _Wire) -> str:
    instruction = rank.program[rank.position]
    assert isinstance(instruction, Await)
    waits = [
        f"{describe(transfer)}, which rank {side} has not launched"
        for transfer in instruction.transfers
        for side in wire.missing_sides(transfer)
    ]
    place = f"rank {rank.number}, instruction {rank.position} of {len(rank.program)}"
    return f"{place}: Await of {'; '.join(waits)}"
