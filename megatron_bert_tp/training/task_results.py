"""What a run on a task leaves behind: predictions, files for benchmarks, metrics, and the summary of its seeds."""

import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from megatron_bert_tp.checkpoint.durable import read_object
from megatron_bert_tp.config.problems import counted
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.formats.task_folder import EVALUATED, RESULT
from megatron_bert_tp.tasks.scoring import Scored

SUMMARY = "summary.json"
PARTS = ("validation", "test")
_LARGEST = 2**24  # bytes of a result.json
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Result:
    """What came of one training: the step of its best checkpoint, and the metrics of each part by its name."""

    seed: int
    best_step: int
    metric: str
    metrics: Mapping[str, Metrics]
    fingerprints: Mapping[str, str]
    """What tells weights and data from others, by their settings."""


def write_part(directory: Path, name: str, scored: Scored) -> list[str]:
    """Write predictions and files for benchmarks of the part ``name``; gives lines to tell.

    ``predictions.<name>.jsonl`` has a record for each example, in their order, ``submission/<name>/`` the files
    in the layout of the task's own benchmark.
    """
    predictions, submission = _files_of_part(directory, name)
    if submission.exists():
        shutil.rmtree(submission)
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in scored.predictions)
    _replace(predictions, "".join(lines))
    for file, content in scored.submissions.items():
        path = submission / file
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, content)
    told = ", ".join(f"{metric} {value:.4f}" for metric, value in scored.metrics.items()) or "no labels"
    return [f"{name}: {told}", f"{predictions}: {counted(len(scored.predictions), 'prediction')}"]


def remove_parts(directory: Path, *, but: Collection[str]) -> list[str]:
    """Remove what an earlier start has written of parts that no result tells of any more; gives lines to tell."""
    told = []
    for name in PARTS:
        predictions, submission = _files_of_part(directory, name)
        if name in but or not predictions.exists():
            continue
        if submission.exists():
            shutil.rmtree(submission)
        predictions.unlink()
        told.append(f"{predictions}: removed, with its submission: the {name} part is measured no longer")
    return told


def _files_of_part(directory: Path, name: str) -> tuple[Path, Path]:
    return directory / f"predictions.{name}.jsonl", directory / "submission" / name


def write_result(directory: Path, result: Result) -> None:
    """Write ``result.json``, the last file of a training: where it is, all else is there."""
    _replace(directory / RESULT, json.dumps(asdict(result), indent=2, allow_nan=False) + "\n")


def read_result(directory: Path) -> Result:
    """What `write_result` has written; DataError for anything else."""
    path = directory / RESULT
    match read_object(path, largest=_LARGEST, error=DataError):
        case {
            "seed": int(seed),
            "best_step": int(best_step),
            "metric": str(metric),
            "metrics": dict(metrics),
            "fingerprints": dict(fingerprints),
        }:
            return Result(seed, best_step, metric, metrics, fingerprints)
    raise DataError(f"{path}: is no result of a training; move it away to measure again")


def write_metrics(directory: Path, metrics: Mapping[str, Metrics]) -> None:
    """Write ``metrics.json``: the metrics of an evaluation, by the name of the part."""
    _replace(directory / EVALUATED, json.dumps(metrics, indent=2, allow_nan=False) + "\n")


def write_summary(directory: Path, results: Mapping[int, Result]) -> None:
    """Write ``summary.json``: every seed, and median, least and most of each metric of each part."""
    content = {
        "seeds": {str(seed): asdict(result) for seed, result in results.items()},
        **spreads(list(results.values())),
    }
    _replace(directory / SUMMARY, json.dumps(content, indent=2, allow_nan=False) + "\n")


def summary_lines(results: Mapping[int, Result]) -> list[str]:
    """A line for each metric of each part."""
    of = counted(len(results), "seed")
    return [
        f"{part} {name}: median {row['median']:.4f} of {of}, {row['least']:.4f} to {row['most']:.4f}"
        for part, rows in spreads(list(results.values())).items()
        for name, row in rows.items()
    ]


def spreads(results: Sequence[Result]) -> dict[str, dict[str, dict[str, float]]]:
    """Median, least and most over the seeds of every metric, by part."""
    parts = [part for part in PARTS if all(part in result.metrics for result in results)]
    return {part: _spreads_of([result.metrics[part] for result in results]) for part in parts}


def _spreads_of(rows: Sequence[Metrics]) -> dict[str, dict[str, float]]:
    names = [name for name in rows[0] if all(name in row for row in rows)] if rows else []
    columns = {name: [row[name] for row in rows] for name in names}
    return {
        name: {"median": median(values), "least": min(values), "most": max(values)}
        for name, values in columns.items()
    }


def _replace(path: Path, text: str) -> None:
    """Write a file in one step: a reader sees the old one or the new one, whole."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
