"""The loss curve of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path

from megatron_bert_tp.training.progress import read_records

Rows = Sequence[dict[str, float | int | str]]


def draw_loss_curve(metrics: Path, picture: Path, *, title: str) -> None:
    """Draw the losses of ``metrics.jsonl`` into ``picture`` (its ending says the format); needs matplotlib."""
    # Here, not above: matplotlib is an extra, and a run has no need of it.
    from matplotlib.figure import Figure

    records = read_records(metrics)
    steps = [record for record in records if record["kind"] == "step"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for axes, key in ((upper, "mlm_loss"), (lower, "nsp_loss")):
        axes.plot(_column(steps, "step"), _column(steps, key), color="#b8cbe0", linewidth=0.8, label="step")
        smooth = _running_mean(_column(steps, key), width=20)
        axes.plot(_column(steps, "step"), smooth, color="#1f4e8c", label="mean of 20 steps")
        axes.plot(_column(evaluations, "step"), _column(evaluations, key), "o-", color="#c8501e", label="held out")
        axes.set_ylabel(f"{key.split('_')[0].upper()} loss (nats)")
        axes.grid(alpha=0.3)
    for record in evaluations:
        if "unigram_loss" in record:
            upper.axhline(float(record["unigram_loss"]), color="0.35", linestyle="--", label="unigram, held out")
    upper.set_title(title)
    upper.legend()
    lower.set_xlabel("optimizer step")
    figure.savefig(picture, dpi=120)


def _column(rows: Rows, key: str) -> list[float]:
    return [float(row[key]) for row in rows]


def _running_mean(values: Sequence[float], *, width: int) -> list[float]:
    """Mean of the last ``width`` values up to each place."""
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]
