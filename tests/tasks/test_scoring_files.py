"""Outputs that say what real files say: all metrics are 1, and submissions have what stands in the files."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_bert_tp.config.task_schema import TaskConfig
from megatron_bert_tp.tasks.examples import Example
from megatron_bert_tp.tasks.feature_table import FeatureTable
from megatron_bert_tp.tasks.features import features_of
from megatron_bert_tp.tasks.labels import labels_of
from megatron_bert_tp.tasks.reading.read import read_examples
from megatron_bert_tp.tasks.scoring import Scored, score
from megatron_bert_tp.tasks.task import Kind
from tests.sources import real_data
from tests.tasks.encoders import encoder_of


def right_outputs(table: FeatureTable, num_labels: int) -> np.ndarray:
    """Outputs from which the labels of the features stand out."""
    assert table.labels is not None
    if table.kind is Kind.CHOICE:
        return np.eye(table.rows_per_sample)[table.labels].reshape(-1, 1)
    if table.kind is Kind.ANSWER:
        outputs = np.zeros((len(table.ids), 2))
        for side in (0, 1):
            outputs[table.bounds[:-1] + table.labels[:, side], side] = 9
        return outputs
    return np.eye(num_labels)[np.maximum(table.labels, 0)]


def scored(name: str, path: Path, folder: Path) -> tuple[Sequence[Example], Scored]:
    task = TaskConfig(name=name)
    examples = read_examples(task, [path], part="validation").examples
    labels = labels_of(task, examples)
    names = labels.names if labels else None
    table = features_of(examples, encoder_of("bert uncased", folder), task, labels=labels, sequence_length=128)
    found = score(task, examples, table, right_outputs(table, len(names or ())), labels=names)
    assert {name: value for name, value in found.metrics.items() if value != 1 and "threshold" not in name} == {}
    return examples, found


@pytest.mark.parametrize(("name", "file"), [("sst-2", "SST-2"), ("rte", "RTE")])
def test_a_file_of_glue_has_its_labels_back(name, file, tmp_path):
    path = real_data(f"glue/{file}/dev.tsv")
    _, found = scored(name, path, tmp_path)
    labels = [line.split("\t")[-1] for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    rows = [line.split("\t") for line in found.submissions[f"{file}.tsv"].splitlines()[1:]]
    assert rows == [[str(number), label] for number, label in enumerate(labels)]


def test_a_folder_of_race_has_its_letters_back(tmp_path):
    folder = real_data("race_layout/dev")
    _, found = scored("race", folder, tmp_path)
    files = [json.loads(path.read_text(encoding="utf-8")) for path in folder.rglob("*.txt")]
    assert json.loads(found.submissions["RACE.json"]) == {each["id"]: each["answers"] for each in files}


def test_questions_have_their_answers_back(tmp_path):
    path = real_data("squad/dev-v2.0.first1050.json")
    _, found = scored("squad", path, tmp_path)
    said = json.loads(found.submissions["predictions.json"])
    asked = [
        question
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    assert list(said) == [question["id"] for question in asked]
    assert {each["id"] for each in asked if not said[each["id"]]} == {
        each["id"] for each in asked if each["is_impossible"]
    }


def test_columns_have_their_tags_back(tmp_path):
    path = real_data("wnut17/emerging.dev.conll")
    examples, found = scored("token-classification", path, tmp_path)
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    told = [line.split() for line in found.submissions["predictions.conll"].splitlines() if line]
    assert told == [[word, tag, tag] for word, tag in lines]
    assert found.submissions["predictions.conll"].count("\n\n") == len(examples)
