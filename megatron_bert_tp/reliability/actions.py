"""What a rank is doing now: shown to whoever watches, and timed by kind."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Protocol

from megatron_bert_tp.pipeline.instructions import Await, Compute, Instruction, Launch, Phase, Transfer, describe

_MOST_KNOWN = 4096  # instructions whose text is kept; those of a run are far fewer, and made once


class Kind(IntEnum):
    """Kinds of actions; a small number, so that it can stand in shared memory."""

    STARTING = 0
    DATA = 1
    FORWARD = 2
    BACKWARD = 3
    WEIGHT_GRADIENT = 4
    MESSAGES = 5
    """Between the stages of a pipeline."""
    GRADIENTS = 6
    """Sums of gradients over ranks, and their norm."""
    OPTIMIZER = 7
    AGREEMENT = 8
    EVALUATION = 9
    SAVING = 10
    DIAGNOSIS = 11
    ENDING = 12

    @property
    def words(self) -> str:
        """For people: ``weight gradient``."""
        return self.name.lower().replace("_", " ")


_KINDS = {
    Phase.FORWARD: Kind.FORWARD,
    Phase.BACKWARD: Kind.BACKWARD,
    Phase.INPUT_GRADIENT: Kind.BACKWARD,
    Phase.WEIGHT_GRADIENT: Kind.WEIGHT_GRADIENT,
}


class Sink(Protocol):
    """Where the current action can be seen (`reliability.board.Board` fits it)."""

    def show(self, kind: Kind, what: str, step: int) -> None:
        """Replace the action shown so far."""


class Clock(Protocol):
    """Adds up seconds by kind; `HostClock`, or on a GPU `reliability.device_clock.DeviceClock`."""

    def enter(self, kind: Kind) -> None:
        """From now on time belongs to ``kind``."""

    def take(self) -> dict[Kind, float]:
        """Seconds by kind since the last call; kinds without any are left out."""


class HostClock:
    """The clock of this process.

    ``waited`` tells the seconds that this rank has ever waited for peers inside other work, such as in the sums of
    a forward; they count as MESSAGES.  Else a slow rank's peers would be as slow as itself.
    """

    def __init__(self, waited: Callable[[], float] | None = None) -> None:
        self._kind, self._since = Kind.STARTING, time.perf_counter()
        self._waited, self._waited_before = waited, 0.0
        self._seconds = [0.0] * len(Kind)

    def enter(self, kind: Kind) -> None:
        """From now on time belongs to ``kind``."""
        now = time.perf_counter()
        self._seconds[self._kind] += now - self._since
        if self._waited is not None:
            self._set_apart(self._waited())
        self._kind, self._since = kind, now

    def take(self) -> dict[Kind, float]:
        """Seconds by kind since the last call; kinds without any are left out."""
        self.enter(self._kind)
        taken = {kind: seconds for kind, seconds in zip(Kind, self._seconds, strict=True) if seconds}
        self._seconds = [0.0] * len(Kind)
        return taken


    def _set_apart(self, waited: float) -> None:
        seconds, self._waited_before = waited - self._waited_before, waited
        self._seconds[self._kind] -= seconds
        self._seconds[Kind.MESSAGES] += seconds


class _Nowhere:
    def show(self, kind: Kind, what: str, step: int) -> None:
        pass


class Actions:
    """The actions of this rank, one after another; used by the thread that trains, and no other."""

    def __init__(self, sink: Sink, clock: Clock | None = None, *, pipeline_ranks: Sequence[int] = ()) -> None:
        """``pipeline_ranks`` are the global ranks of this rank's pipeline; with them, texts name global ranks."""
        self._sink = sink
        self._clock = HostClock() if clock is None else clock
        self._pipeline_ranks = tuple(pipeline_ranks)
        self._step = 0
        self._around: Kind | None = None
        # By identity: hashing an instruction costs more than writing its text.  The instruction itself is kept,
        # so that no other can take its place in memory.
        self._known: dict[int, tuple[Instruction, Kind, str]] = {}

    @classmethod
    def silent(cls) -> "Actions":
        """Shown to nobody."""
        return cls(_Nowhere())

    def begin_step(self, step: int) -> None:
        """All actions from now on belong to ``step``, the number of steps done when it is over."""
        self._step = step

    def enter(self, kind: Kind, what: str = "") -> None:
        """Begin an action; the one before is over.  ``what`` says more than the kind does."""
        self._clock.enter(kind)
        self._sink.show(kind, what, self._step)

    @contextmanager
    def within(self, kind: Kind) -> Iterator[None]:
        """Context manager: all instructions of the pipeline in it are of ``kind``, such as EVALUATION."""
        self._around = kind
        self.enter(kind)
        try:
            yield
        finally:
            self._around = None

    def instruction(self, instruction: Instruction | None) -> None:
        """Begin an instruction of the pipeline (`pipeline.executor.Observe`); None is the end of the program."""
        if instruction is None:
            self.enter(self._around or Kind.MESSAGES, "adds up the losses of all ranks")
            return
        known = self._known.get(id(instruction))
        if known is None:
            known = self._learn(instruction)
        self.enter(self._around or known[1], known[2])

    def take_seconds(self) -> dict[Kind, float]:
        """Seconds by kind since the last call; kinds without any are left out."""
        return self._clock.take()

    def _learn(self, instruction: Instruction) -> tuple[Instruction, Kind, str]:
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        kind = _KINDS[instruction.phase] if isinstance(instruction, Compute) else Kind.MESSAGES
        known = instruction, kind, self._text(instruction)
        self._known[id(instruction)] = known
        return known

    def _text(self, instruction: Instruction) -> str:
        match instruction:
            case Compute(phase, microbatch, chunk):
                return f"{phase.value} of microbatch {microbatch}" + (f" (chunk {chunk})" if chunk else "")
            case Launch(transfers):
                return f"starts: {'; '.join(map(self._route, transfers))}"
            case Await(transfers):
                return f"waits for: {'; '.join(map(self._route, transfers))}"

    def _route(self, transfer: Transfer) -> str:
        """A message in words, with global ranks where they are known."""
        if not self._pipeline_ranks:
            return describe(transfer)
        source, target = self._pipeline_ranks[transfer.source], self._pipeline_ranks[transfer.target]
        return describe(Transfer(transfer.phase, transfer.microbatch, transfer.chunk, source, target))
