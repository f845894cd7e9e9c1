"""ASCII drawing of a simulated pipeline: ranks as rows, time in columns."""

from bisect import bisect_right
from collections.abc import Callable, Sequence

from megatron_bert_tp.pipeline.instructions import Compute, Phase
from megatron_bert_tp.pipeline.simulate import Interval, Timeline

MARKS = {
    Phase.FORWARD: "0123456789",
    Phase.BACKWARD: "abcdefghij",
    Phase.INPUT_GRADIENT: "abcdefghij",
    Phase.WEIGHT_GRADIENT: "ABCDEFGHIJ",
}
IDLE = "."
LEGEND = "0-9 forward, a-j backward of microbatch 0-9 (again from 10), . idle; live: most activations held"
WEIGHT_LEGEND = "a-j input gradient alone, A-J weight gradient; waiting: most weight gradients put off"
CHUNK_LEGEND = "second line of a rank: the chunk that the pass belongs to"


def draw(timeline: Timeline, *, width: int = 100) -> str:
    """The timeline as text of at most ``width`` columns (at least 40), with legend and totals.

    A column is as long as the shortest pass, or longer where the drawing would not fit; it shows
    the pass that runs in its middle.  Ranks with several chunks take two lines, the second one for the chunk.
    """
    passes = [interval.compute for row in timeline.ranks for interval in row]
    has_chunks = any(compute.chunk for compute in passes)
    has_weights = any(compute.phase is Phase.WEIGHT_GRADIENT for compute in passes)
    labels = [f"{'rank' if has_chunks else 'stage'} {rank} |" for rank in range(len(timeline.ranks))]
    ends = [_end(timeline, rank, has_weights) for rank in range(len(timeline.ranks))]
    indent = max(map(len, labels))
    unit = _time_per_column(timeline, max(width, 40) - indent - max(map(len, ends)))
    num_columns = round(timeline.length / unit)
    lines: list[str] = []
    for label, row, end in zip(labels, timeline.ranks, ends, strict=True):
        lines.append(f"{label:>{indent}}{_row(row, unit, num_columns, _symbol)}{end}")
        lines += [f"{'|':>{indent}}{_row(row, unit, num_columns, _chunk)}|"] if has_chunks else []
    totals = f"length {timeline.length:g}, idle {timeline.idle_share:.1%}, {unit:g} per column"
    notes = [WEIGHT_LEGEND] * has_weights + [CHUNK_LEGEND] * has_chunks
    return "\n".join([*lines, totals, LEGEND, *notes])


def _end(timeline: Timeline, rank: int, has_weights: bool) -> str:
    waiting = f", waiting {timeline.peak_deferred(rank)}" if has_weights else ""
    return f"| live {timeline.peak_live(rank)}{waiting}"


def _time_per_column(timeline: Timeline, num_columns: int) -> float:
    passes = [i.end - i.start for row in timeline.ranks for i in row if i.end > i.start]
    return max(min(passes, default=1.0), timeline.length / num_columns)


def _row(intervals: Sequence[Interval], unit: float, num_columns: int, symbol: Callable[[Compute], str]) -> str:
    starts = [interval.start for interval in intervals]
    return "".join(_mark(intervals, starts, (column + 0.5) * unit, symbol) for column in range(num_columns))


def _mark(
    intervals: Sequence[Interval], starts: Sequence[float], time: float, symbol: Callable[[Compute], str]
) -> str:
    place = bisect_right(starts, time) - 1
    if place < 0 or intervals[place].end <= time:
        return IDLE
    return symbol(intervals[place].compute)


def _symbol(compute: Compute) -> str:
    return MARKS[compute.phase][compute.microbatch % 10]


def _chunk(compute: Compute) -> str:
    return str(compute.chunk % 10)
