"""What a run on a task tells of its data before it trains."""

import csv
from pathlib import Path

import pytest

from megatron_bert_tp.config.load import load_task
from megatron_bert_tp.config.task_table import Kind
from megatron_bert_tp.training.task_data import open_task_data
from tests.finetuning.runs import result_of, tune
from tests.sources import ROOT, fenced_block

LABELS = ("sport", "art", "sport", "science")


def told_of(settings: Path, *overrides: str) -> list[str]:
    """Lines that opening the data of a task tells."""
    told: list[str] = []
    open_task_data(load_task(settings, overrides), verifies=False, learns=True, say=told.append)
    return [line for text in told for line in text.splitlines()]


def table(path: Path, rows: int = 12) -> Path:
    """CSV file with columns text and label, and classes in turn."""
    with path.open("w", encoding="utf-8", newline="") as file:
        content = ([f"word {row} and some more", LABELS[row % len(LABELS)]] for row in range(rows))
        csv.writer(file).writerows([["text", "label"], *content])
    return path


@pytest.mark.parametrize(
    ("kind", "examples"),
    [
        (Kind.CLASS, "48 examples, 2 classes, "),
        (Kind.CLASSES, "48 examples, 3 classes, "),
        (Kind.NUMBER, "48 examples, "),
        (Kind.TAGS, "48 examples, 5 tags, "),
    ],
)
def test_the_training_data_is_told_with_the_number_of_its_classes(files_of, kind, examples):
    first = next(line for line in told_of(files_of(kind).settings) if line.startswith("training: "))
    numbers, word = first.removeprefix(f"training: {examples}").split(" ")
    assert word == "tokens", first
    assert numbers.replace(",", "").isdecimal(), first


def test_one_of_a_kind_is_told_as_one(files_of, tmp_path):
    validation = tmp_path / "dev.csv"
    validation.write_text("text,label\n" + "many words " * 40 + ",film\n", encoding="utf-8")
    told = told_of(files_of(Kind.CLASSES).settings, f"data.validation={validation}")
    assert [line for line in told if line.startswith("validation: ")] == [
        "validation: 1 example, 32 tokens",
        "validation: 1 sample is longer than data.sequence_length (32) and loses its last tokens",
    ]


def test_the_settings_file_of_the_documentation_runs(ranks, small_model, tmp_path):
    settings = tmp_path / "task.yaml"
    settings.write_text(fenced_block((ROOT / "docs" / "finetune.md").read_text(encoding="utf-8"), "yaml"))
    files = [f"data.{part}={table(tmp_path / f'{part}.csv')}" for part in ("train", "validation")]
    given = [f"model.weights={small_model}", *files, "run.device=cpu"]
    assert "training: 12 examples, 3 classes, " in told_of(settings, *given)[0]
    found = result_of(tune(ranks, settings, tmp_path / "run", *given))
    assert found["metric"] == "accuracy"
