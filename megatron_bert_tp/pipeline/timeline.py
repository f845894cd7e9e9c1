"""ASCII drawing of a simulated pipeline: stages as rows, time in columns."""

from bisect import bisect_right
from collections.abc import Sequence

from megatron_bert_tp.pipeline.schedule import Compute, Phase
from megatron_bert_tp.pipeline.simulate import Interval, Timeline

MARKS = {Phase.FORWARD: "0123456789", Phase.BACKWARD: "abcdefghij"}
IDLE = "."
LEGEND = "0-9 forward, a-j backward of microbatch 0-9 (again from 10), . idle; live: most activations held"


def draw(timeline: Timeline, *, width: int = 100) -> str:
    """The timeline as text of at most ``width`` columns (at least 40), with legend and totals.

    A column is as long as the shortest pass, or longer where the drawing would not fit; it shows
    the pass that runs in its middle.
    """
    labels = [f"stage {stage} |" for stage in range(len(timeline.stages))]
    ends = [f"| live {timeline.peak_live(stage)}" for stage in range(len(timeline.stages))]
    margin = max(map(len, labels)) + max(map(len, ends))
    unit = _time_per_column(timeline, max(width, 40) - margin)
    rows = [_row(row, unit, round(timeline.length / unit)) for row in timeline.stages]
    indent = max(map(len, labels))
    lines = [f"{label:>{indent}}{row}{end}" for label, row, end in zip(labels, rows, ends, strict=True)]
    totals = f"length {timeline.length:g}, idle {timeline.idle_share:.1%}, {unit:g} per column"
    return "\n".join([*lines, totals, LEGEND])


def _time_per_column(timeline: Timeline, num_columns: int) -> float:
    passes = [i.end - i.start for row in timeline.stages for i in row if i.end > i.start]
    return max(min(passes, default=1.0), timeline.length / num_columns)


def _row(intervals: Sequence[Interval], unit: float, num_columns: int) -> str:
    starts = [interval.start for interval in intervals]
    return "".join(_mark(intervals, starts, (column + 0.5) * unit) for column in range(num_columns))


def _mark(intervals: Sequence[Interval], starts: Sequence[float], time: float) -> str:
    place = bisect_right(starts, time) - 1
    if place < 0 or intervals[place].end <= time:
        return IDLE
    return _symbol(intervals[place].compute)


def _symbol(compute: Compute) -> str:
    return MARKS[compute.phase][compute.microbatch % 10]
