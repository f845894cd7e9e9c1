"""Discrete-event simulation of pipeline programs: what runs when, and whether it runs at all.

The transport is the strictest that there is: a transfer completes only when both sides have launched it,
an `Await` blocks until all of its transfers are complete, and messages from one rank to another
arrive in the order in which they were sent.  A program that passes here passes on any backend.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from megatron_bert_tp.errors import ScheduleError
from megatron_bert_tp.pipeline.messages import check_messages, describe
from megatron_bert_tp.pipeline.schedule import Await, Compute, Launch, Phase, Program, Transfer


@dataclass(frozen=True)
class Durations:
    """Time of each stage's passes and of a message, all in one unit of the caller's choice."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    transfer: float = 0.0

    @classmethod
    def equal(cls, num_stages: int, *, forward: float, backward: float, transfer: float = 0.0) -> "Durations":
        """The same durations on every stage."""
        return cls((forward,) * num_stages, (backward,) * num_stages, transfer)

    def of(self, compute: Compute, stage: int) -> float:
        """Time that ``compute`` takes on ``stage``."""
        return {Phase.FORWARD: self.forward, Phase.BACKWARD: self.backward}[compute.phase][stage]


@dataclass(frozen=True)
class Interval:
    """When one pass ran."""

    start: float
    end: float
    compute: Compute


@dataclass(frozen=True)
class Timeline:
    """What ran when: one row of intervals per stage, in ascending time.  Times as in `Durations`."""

    stages: tuple[tuple[Interval, ...], ...]

    @property
    def length(self) -> float:
        """Time from 0 to the end of the last pass on any stage."""
        return max((row[-1].end for row in self.stages if row), default=0.0)

    @property
    def idle_share(self) -> float:
        """Share of all stages' time in which nothing is computed, from 0 to 1: the bubble."""
        available = self.length * len(self.stages)
        busy = sum(interval.end - interval.start for row in self.stages for interval in row)
        return (available - busy) / available if available else 0.0

    def peak_live(self, stage: int) -> int:
        """Most microbatches whose activations ``stage`` holds at one time.

        They live from the start of their forward to the end of their backward; those of a forward
        that has no backward (evaluation) end with it.
        """
        passes = [interval.compute for interval in self.stages[stage]]
        trained = {(c.microbatch, c.chunk) for c in passes if c.phase is Phase.BACKWARD}
        if not trained:
            return min(len(passes), 1)
        return max(accumulate(1 if c.phase is Phase.FORWARD else -1 for c in passes))

    @property
    def max_peak_live(self) -> int:
        """`peak_live` of the stage that holds most."""
        return max(self.peak_live(stage) for stage in range(len(self.stages)))


@dataclass
class _Stage:
    """How far one stage has come in its program."""

    number: int
    program: Program
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

    def launch(self, transfer: Transfer, *, stage: int, time: float) -> None:
        self._launched.setdefault(transfer, {})[stage] = time

    def missing_sides(self, transfer: Transfer) -> tuple[int, ...]:
        """Stages that still have to launch ``transfer``."""
        sides: Mapping[int, float] = self._launched.get(transfer, {})
        return tuple(side for side in (transfer.source, transfer.target) if side not in sides)

    def completion(self, transfer: Transfer) -> float:
        return max(self._launched[transfer].values()) + self._seconds


def simulate(programs: Sequence[Program], durations: Durations) -> Timeline:
    """Timeline of ``programs`` (one per stage) when passes and messages take ``durations``.

    Raises ScheduleError when messages do not match (`check_messages`), and for a deadlock, with each stuck
    stage, the instruction at which it is stuck and what that waits for.
    """
    if not len(programs) == len(durations.forward) == len(durations.backward):
        raise ScheduleError(
            f"{len(programs)} programs need as many durations, got {len(durations.forward)} of forward "
            f"and {len(durations.backward)} of backward passes; give one per stage"
        )
    check_messages(programs)
    stages = [_Stage(number, program) for number, program in enumerate(programs)]
    wire = _Wire(durations.transfer)
    while any([_advance(stage, wire, durations) for stage in stages]):  # noqa: C419 - all of them, not the first
        pass
    if not all(stage.is_done for stage in stages):
        raise ScheduleError(_deadlock(stages, wire))
    return Timeline(tuple(tuple(stage.intervals) for stage in stages))


def _advance(stage: _Stage, wire: _Wire, durations: Durations) -> bool:
    """Walk the program up to the next `Await` that is not complete; whether it moved at all."""
    before = stage.position
    while not stage.is_done and _step(stage, wire, durations):
        stage.position += 1
    return stage.position > before


def _step(stage: _Stage, wire: _Wire, durations: Durations) -> bool:
    """Do the instruction at ``stage.position``; False when it has to wait."""
    match stage.program[stage.position]:
        case Launch(transfers):
            for transfer in transfers:
                wire.launch(transfer, stage=stage.number, time=stage.clock)
        case Await(transfers):
            if any(wire.missing_sides(transfer) for transfer in transfers):
                return False
            stage.clock = max([stage.clock, *(wire.completion(transfer) for transfer in transfers)])
        case Compute() as compute:
            start = stage.clock
            stage.clock += durations.of(compute, stage.number)
            stage.intervals.append(Interval(start, stage.clock, compute))
    return True


def _deadlock(stages: Sequence[_Stage], wire: _Wire) -> str:
    stuck = [_stuck(stage, wire) for stage in stages if not stage.is_done]
    return "\n  ".join(
        [
            "deadlock: these stages wait for each other for ever; "
            "launch the messages of one gap together, sends and receives",
            *stuck,
        ]
    )


def _stuck(stage: _Stage, wire: _Wire) -> str:
    instruction = stage.program[stage.position]
    assert isinstance(instruction, Await)
    waits = [
        f"{describe(transfer)}, which stage {side} has not launched"
        for transfer in instruction.transfers
        for side in wire.missing_sides(transfer)
    ]
    place = f"stage {stage.number}, instruction {stage.position} of {len(stage.program)}"
    return f"{place}: Await of {'; '.join(waits)}"
