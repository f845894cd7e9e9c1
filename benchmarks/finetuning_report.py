"""Rows of `finetuning.py`: what came of a task on each side, and how far the two lie apart."""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

SIDES = {"pretrained": "false", "random": "true"}
"""Name of a side, and its model.random_weights."""
Rows = Mapping[str, Mapping[str, Mapping[str, object]]]
"""Task to side to row."""


def result_of(directory: Path) -> dict[str, object]:
    """Metric that kept the best checkpoints, its median and spread, each seed, and all other metrics of a run."""
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    seeds = summary["seeds"]
    metrics = {result["metric"] for result in seeds.values()}
    assert len(metrics) == 1, metrics
    metric = metrics.pop()
    return {
        "metric": metric,
        **summary["validation"][metric],
        "seeds": {seed: result["metrics"]["validation"][metric] for seed, result in seeds.items()},
        "best_steps": {seed: result["best_step"] for seed, result in seeds.items()},
        "all_metrics": summary["validation"],
        "seconds_of_steps": round(sum(seconds_of_steps(directory / f"seed_{seed}") for seed in seeds), 1),
    }


def seconds_of_steps(directory: Path) -> float:
    """Seconds of all training steps of a run, without starts, evaluations and saves."""
    with (directory / "metrics.jsonl").open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return sum(float(record["seconds"]) for record in records if record["kind"] == "step")


def read_rows(file: Path) -> Rows:
    """Rows of an earlier call; none where there is no file."""
    if not file.exists():
        return {}
    rows: Rows = json.loads(file.read_text(encoding="utf-8"))["tasks"]
    return {name: {side: row for side, row in sides.items() if side in SIDES} for name, sides in rows.items()}


def add_row(file: Path, name: str, side: str, row: Mapping[str, object], *, order: Sequence[str]) -> None:
    """Add a row, or put it in the place of an older one; the rows stand in the order of the tasks.

    The file is replaced in one step, and two calls of the driver may share it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = read_rows(file)
        rows = {**rows, name: {**rows.get(name, {}), side: row}}
        tasks = {each: {**rows[each], **comparison(rows[each])} for each in order if each in rows}
        partial = file.with_name(f"{file.name}.partial")
        partial.write_text(json.dumps({"tasks": tasks}, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, file)


def comparison(sides: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """``gain``: the medians' difference; ``is_apart``: the worst seed of the weights is above the best random one.

    Nothing where a side is missing, or the two differ in more than where they begin.
    """
    if sides.keys() != SIDES.keys():
        return {}
    pretrained, random = sides["pretrained"], sides["random"]
    if any(_shared(pretrained, name) != _shared(random, name) for name in ("settings", "files", "sizes")):
        return {}
    return {
        "gain": _number(pretrained, "median") - _number(random, "median"),
        "is_apart": _number(pretrained, "least") > _number(random, "most"),
    }


def _shared(row: Mapping[str, object], name: str) -> object:
    value = row[name]
    return [each for each in value if "random_weights" not in each] if isinstance(value, list) else value


def _number(row: Mapping[str, object], name: str) -> float:
    value = row[name]
    assert isinstance(value, float | int), name
    return float(value)


def show(rows: Rows) -> None:
    """A line for each task; "apart" is `is_apart` of `comparison`."""
    table = Table("task", "metric", *SIDES, "gain", "apart", "minutes")
    for name, sides in rows.items():
        compared = comparison(sides)
        metric = next(iter(sides.values()))["metric"]
        minutes = sum(_number(row, "seconds_of_steps") for row in sides.values()) / 60
        gain = f"{compared['gain']:+.4f}" if compared else ""
        apart = ("yes" if compared["is_apart"] else "no") if compared else ""
        spreads = (spread(sides[side]) if side in sides else "" for side in SIDES)
        table.add_row(name, str(metric), *spreads, gain, apart, f"{minutes:.1f}")
    Console(width=115).print(table)


def spread(row: Mapping[str, object]) -> str:
    """Median, and least to most."""
    median, least, most = (_number(row, name) for name in ("median", "least", "most"))
    return f"{median:.4f} ({least:.4f} to {most:.4f})"
