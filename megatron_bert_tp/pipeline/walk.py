"""Orders of passes walked in whole units of time: what runs when if messages take none, and what never runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_bert_tp.errors import ScheduleError
from megatron_bert_tp.pipeline.instructions import (
    Compute,
    Order,
    Phase,
    Transfer,
    describe,
    input_transfer,
    output_transfer,
)
from megatron_bert_tp.pipeline.placement import Placement

UNITS = {Phase.FORWARD: 1, Phase.BACKWARD: 2, Phase.INPUT_GRADIENT: 1, Phase.WEIGHT_GRADIENT: 1}


@dataclass(frozen=True)
class Walk:
    """When one rank's passes start and end, by their position in its order.

    A gap is the place before the pass of its number, or after the last one.
    """

    starts: tuple[float, ...]
    ends: tuple[float, ...]

    def launch_time(self, gap: int) -> float:
        """When the rank comes to this gap."""
        return self.ends[gap - 1] if gap else 0.0

    def first_gap(self, *, after: int, time: float) -> int:
        """The first gap from ``after`` on that the rank leaves at ``time`` or later."""
        gaps = range(after, len(self.starts))
        return next((gap for gap in gaps if self.starts[gap] >= time), max(after, len(self.starts)))


@dataclass
class _Walker:
    """How far one rank has come."""

    rank: int
    order: Order
    placement: Placement
    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.ends) == len(self.order)

    @property
    def next(self) -> Compute:
        return self.order[len(self.ends)]

    def advance(self, ready: dict[Transfer, float]) -> bool:
        """Walk up to the next pass whose input is not ``ready``; whether it moved at all."""
        before = len(self.ends)
        while not self.is_done:
            needed = input_transfer(self.next, self.rank, self.placement)
            if needed and needed not in ready:
                break
            self._do(self.next, ready, start=ready[needed] if needed else 0.0)
        return len(self.ends) > before

    def _do(self, compute: Compute, ready: dict[Transfer, float], *, start: float) -> None:
        self.starts.append(max(start, self.ends[-1] if self.ends else 0.0))
        self.ends.append(self.starts[-1] + UNITS[compute.phase])
        made = output_transfer(compute, self.rank, self.placement)
        if made:
            ready[made] = self.ends[-1]

    def stuck(self) -> str:
        needed = input_transfer(self.next, self.rank, self.placement)
        assert needed is not None
        name = f"{self.next.phase.value} of microbatch {self.next.microbatch} (chunk {self.next.chunk})"
        return f"rank {self.rank}, pass {len(self.ends)} of {len(self.order)}, {name}: needs {describe(needed)}"


def walk(orders: Sequence[Order], placement: Placement) -> tuple[Walk, ...]:
    """Every rank does its passes in order, each as soon as its input is there; one walk for each rank.

    Raises ScheduleError where ranks wait for each other for ever, with the pass at which each is stuck.
    """
    walkers = [_Walker(rank, order, placement) for rank, order in enumerate(orders)]
    ready: dict[Transfer, float] = {}
    while any([walker.advance(ready) for walker in walkers]):  # noqa: C419 - all of them, not the first
        pass
    stuck = [walker.stuck() for walker in walkers if not walker.is_done]
    if stuck:
        reason = "deadlock: these ranks wait for passes that never come; change the order of passes"
        raise ScheduleError("\n  ".join([reason, *stuck]))
    return tuple(Walk(tuple(walker.starts), tuple(walker.ends)) for walker in walkers)
