"""Which ranks are slower than others that do the same work, and in what.

Only a rank's own work counts: a slow rank shows in its peers' messages, where they wait for it.

A busy machine makes single steps several times slower.  Therefore an interval is told by the median and the lower
quartile of its steps, and a rank is slow when its median is 15% above its peers' (so that one which is 20% slower
is found in spite of noise) and its fast steps are slow too, in two intervals one after another.  Times of two
processes on two overloaded cores, steps up to five times slower than usual, gave fewer than one false report in
1000 steps with intervals of 50 steps.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from megatron_bert_tp.reliability.actions import Kind

COUNTED = (Kind.DATA, Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT_GRADIENT, Kind.OPTIMIZER)
SLOWER, FAST_STEPS_SLOWER = 1.15, 1.1
LEAST_SECONDS, LEAST_SHARE = 1e-3, 0.02
"""What a step must lose to be worth a word: 1 ms, the wake-ups of a system, and 2% of the work of a step."""
_REMEMBERED, _NEEDED = 10, 3  # intervals of a rank without peers


class StepTimes:
    """Seconds of the steps of one interval on one rank."""

    def __init__(self) -> None:
        self._steps: list[Mapping[Kind, float]] = []

    def add(self, seconds: Mapping[Kind, float]) -> None:
        """Another step (`Actions.take_seconds`)."""
        self._steps.append(seconds)

    def take(self) -> list[float]:
        """Median and lower quartile of each counted kind, as many numbers on each rank; then forget the steps."""
        columns = [[step.get(kind, 0.0) for step in self._steps] or [0.0] for kind in COUNTED]
        self._steps = []
        return [number for column in columns for number in (median(column), _lower_quartile(column))]


@dataclass(frozen=True)
class Speed:
    """Seconds a step of one rank in one interval.

    Ranks of equal ``place`` do equal work: the place on the pipeline, in most layouts.
    """

    rank: int
    place: int
    usual: Mapping[Kind, float]
    """Medians."""
    fast: Mapping[Kind, float]
    """Lower quartiles."""

    @classmethod
    def of(cls, rank: int, place: int, numbers: Sequence[float]) -> "Speed":
        """From what `StepTimes.take` gave on that rank."""
        pairs = list(zip(COUNTED, numbers[::2], numbers[1::2], strict=True))
        return cls(rank, place, {kind: usual for kind, usual, _ in pairs}, {kind: fast for kind, _, fast in pairs})

    @property
    def step(self) -> float:
        """All counted work of a step."""
        return sum(self.usual.values())


@dataclass(frozen=True)
class Straggler:
    """A rank that takes ``seconds`` a step for work of ``kind``, for which ``median`` is usual."""

    rank: int
    kind: Kind
    seconds: float
    median: float
    has_peers: bool

    @property
    def line(self) -> str:
        """For people."""
        usual = "its peers' median is" if self.has_peers else "until now it took"
        return (
            f"rank {self.rank} is slow: {self.kind.words} takes {1000 * self.seconds:.3g} ms a step, "
            f"{usual} {1000 * self.median:.3g} ms"
        )


class Stragglers:
    """Compares ranks, interval by interval; a rank without peers is compared with its own last intervals."""

    def __init__(self) -> None:
        self._suspects: set[tuple[int, Kind]] = set()
        self._earlier: dict[int, deque[Speed]] = {}

    def report(self, rows: Sequence[Speed]) -> list[Straggler]:
        """Ranks that were slow in this interval and in the one before; ``rows`` has all ranks."""
        slow = [found for row in rows for kind in COUNTED if (found := self._slow(row, kind, rows)) is not None]
        reported = [found for found in slow if (found.rank, found.kind) in self._suspects]
        self._suspects = {(found.rank, found.kind) for found in slow}
        for row in rows:
            self._earlier.setdefault(row.rank, deque(maxlen=_REMEMBERED)).append(row)
        return reported

    def _slow(self, row: Speed, kind: Kind, rows: Sequence[Speed]) -> Straggler | None:
        peers = [other for other in rows if other.place == row.place and other.rank != row.rank]
        if peers:
            usual, step = median(peer.usual[kind] for peer in peers), median(peer.step for peer in peers)
        else:
            scale, earlier = self._scale(row, rows), self._earlier.get(row.rank, deque())
            if scale is None:
                return None
            usual = scale * median(speed.usual[kind] for speed in earlier)
            step = scale * median(speed.step for speed in earlier)
        is_slow = row.usual[kind] > SLOWER * usual and row.fast[kind] > FAST_STEPS_SLOWER * usual
        if not is_slow or row.usual[kind] - usual < max(LEAST_SECONDS, LEAST_SHARE * step):
            return None
        return Straggler(row.rank, kind, row.usual[kind], usual, bool(peers))

    def _scale(self, row: Speed, rows: Sequence[Speed]) -> float | None:
        """How much slower than before the other ranks are, as when batches grow; None while little is known."""
        if len(self._earlier.get(row.rank, ())) < _NEEDED:
            return None
        others = [other for other in rows if other.rank != row.rank]
        before = [median(speed.step for speed in self._earlier[other.rank]) for other in others]
        changes = [other.step / step for other, step in zip(others, before, strict=True) if step]
        return median(changes) if changes else 1.0


def _lower_quartile(column: Sequence[float]) -> float:
    return quantiles(column, n=4, method="inclusive")[0] if len(column) > 1 else column[0]
