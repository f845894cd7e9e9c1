"""TREC's questions."""

from collections import Counter

import pytest

from megatron_bert_tp.tasks.task import TASKS
from tests.sources import real_data
from tests.tasks.reading import read, refusal, write


@pytest.mark.parametrize(("part", "count"), [("train", 5452), ("test", 500)])
@pytest.mark.parametrize("name", ["trec", "trec-fine"])
def test_all_questions_of_the_real_files_are_read(name, part, count):
    path = real_data(f"trec_qc/{part}.txt")
    rows = [line.split(b" ", 1) for line in path.read_bytes().split(b"\n") if line]
    names = [label if name == "trec-fine" else label.split(b":")[0] for label, _ in rows]
    examples = read(name, path).examples
    assert len(examples) == count
    assert [example.label.encode() for example in examples] == names
    assert [example.text.encode("latin-1") for example in examples] == [text for _, text in rows]


def test_the_real_classes_are_6_and_50():
    path = real_data("trec_qc/train.txt")
    coarse = Counter(example.label for example in read("trec", path).examples)
    assert tuple(sorted(coarse)) == TASKS["trec"].labels
    assert len({example.label for example in read("trec-fine", path).examples}) == 50


def test_a_byte_above_127_is_latin_1(tmp_path):
    path = tmp_path / "train.txt"
    path.write_bytes(b"HUM:ind Who was Andr\xe9 ?\r\n\r\nNUM:date When ?\r\n")
    reading = read("trec", path)
    assert [(e.text, e.place) for e in reading.examples] == [
        ("Who was André ?", f"{path}:1"),
        ("When ?", f"{path}:3"),
    ]
    assert reading.notes == (f"{path}: 1 blank line passed over",)


def test_questions_without_classes_are_read_where_labels_are_not_needed(tmp_path):
    path = write(tmp_path / "test.txt", "Who is it: Bo ?", "NUM:date When ?")
    found = [(example.text, example.label) for example in read("trec", path, part="test").examples]
    assert found == [("Who is it: Bo ?", None), ("When ?", "NUM")]


@pytest.mark.parametrize("line", ["Who ?", "HUM Who ?", "HUM:ind", "HUM:ind ", "hum:ind Who ?"])
def test_a_line_without_a_class_is_refused(line, tmp_path):
    path = write(tmp_path / "train.txt", "HUM:ind Who ?", line)
    assert refusal("trec", path).startswith(f"{path}:2: must be a class and a question")
