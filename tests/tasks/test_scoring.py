"""From outputs to metrics, predictions and files, for every kind of task."""

import json
from typing import Any

import numpy as np
import pytest

from megatron_bert_tp.config.task_schema import TaskConfig
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks.examples import (
    UNKNOWN_PLACE,
    Answer,
    AnswerExample,
    ChoiceExample,
    Example,
    TextExample,
    WordsExample,
)
from megatron_bert_tp.tasks.feature_table import FeatureTable, bounds_of
from megatron_bert_tp.tasks.scoring import Scored, may_be_unanswerable, score
from megatron_bert_tp.tasks.task import TASKS


def table_of(name: str, lengths: list[int], examples: list[int], **fields: Any) -> FeatureTable:
    bounds = bounds_of(np.array(lengths))
    return FeatureTable(
        kind=TASKS[name].kind,
        ids=np.zeros(bounds[-1], dtype=np.int32),
        types=np.zeros(bounds[-1], dtype=np.uint8),
        bounds=bounds,
        examples=np.array(examples),
        **fields,
    )


def texts(*labels: Any, groups: str = "") -> list[Example]:
    return [
        TextExample(id=f"t{number}", place=f"dev.tsv:{number + 1}", text="x", label=label, group=group)
        for number, (label, group) in enumerate(zip(labels, groups or [""] * len(labels), strict=True))
    ]


def scored(
    name: str, examples: list[Example], table: FeatureTable, outputs: Any, *labels: str, **more: Any
) -> Scored:
    found = score(
        TaskConfig(name=name), examples, table, np.array(outputs, np.float32), labels=labels or None, **more
    )
    for record in found.predictions:
        json.dumps(record, allow_nan=False)
    assert [record["id"] for record in found.predictions] == [example.id for example in examples]
    return found


def test_a_class_is_the_largest_logit_whatever_the_order_of_the_samples():
    labels = ("negative", "positive")
    table = table_of("sst-2", [3, 3, 3], [2, 0, 1], labels=np.array([1, 0, 0]))
    outputs = np.log([[1, 3], [4, 1], [1, 9]])  # of the third, the first and the second example
    found = scored("sst-2", texts("negative", "negative", "positive"), table, outputs, *labels)
    assert found.metrics == {"accuracy": 2 / 3}
    assert [record["label"] for record in found.predictions] == ["negative", "positive", "positive"]
    assert [record["expected"] for record in found.predictions] == ["negative", "negative", "positive"]
    # Logits are float32, of at most 2.2.
    assert found.predictions[0]["scores"] == pytest.approx({"negative": 0.8, "positive": 0.2}, rel=1e-6)
    assert found.submissions["SST-2.tsv"] == "index\tprediction\n0\t0\n1\t1\n2\t1\n"


def test_the_order_of_the_classes_is_that_of_the_labels_given():
    table = table_of("sst-2", [3], [0])
    found = scored("sst-2", texts(None), table, [[5, 1]], "positive", "negative")
    assert found.predictions[0]["label"] == "positive"
    assert found.submissions["SST-2.tsv"].endswith("0\t1\n"), "GLUE has its own order"


@pytest.mark.parametrize("name", ["mrpc", "qqp"])
def test_f1_is_that_of_the_tasks_own_class_1_whatever_the_order_of_the_labels(name):
    own = TASKS[name].labels
    said, expected = np.array([1, 1, 0, 0, 0, 0]), np.array([1, 1, 1, 0, 0, 0])
    for order in ([0, 1], [1, 0]):
        labels = [own[number] for number in order]
        # Where the order is turned, number 0 is the task's class 1.
        table = table_of(name, [3] * 6, list(range(6)), labels=np.take(order, expected))
        examples = texts(*(own[number] for number in expected))
        found = scored(name, examples, table, np.eye(2)[np.take(order, said)], *labels)
        # Class 1: found 2 of 3.  Class 0: found all 3, 1 too many, which would be an F1 of 6 / 7.
        assert found.metrics == pytest.approx({"f1": 4 / 5, "accuracy": 5 / 6}, rel=1e-15)
        assert [record["label"] for record in found.predictions] == [own[number] for number in said]


def test_several_classes_hold_where_their_logit_is_above_0():
    table = table_of("multi-label", [3, 3], [0, 1], labels=np.array([[1, 0, 1], [0, 0, 0]], dtype=np.float32))
    outputs = [[0.5, -0.5, -1000], [0, -2, 1000]]
    found = scored("multi-label", texts(("a", "c"), ()), table, outputs, *"abc")
    assert [record["labels"] for record in found.predictions] == [["a"], ["c"]]
    assert [record["expected"] for record in found.predictions] == [["a", "c"], []]
    assert found.predictions[1]["scores"] == pytest.approx(
        {"a": 0.5, "b": 1 / (1 + np.exp(2)), "c": 1.0}, rel=1e-12
    )
    assert found.predictions[0]["scores"]["c"] == 0
    # a is found, c is missed here and too many there.
    assert found.metrics == pytest.approx({"f1_micro": 2 / 4, "f1_macro": 1 / 3, "exact_match": 0.0}, rel=1e-15)


def test_a_number_is_told_as_it_is_and_clipped_for_glue_alone():
    table = table_of("sts-b", [3, 3, 3], [0, 1, 2], labels=np.array([1.0, 2.0, 4.0]))
    found = scored("sts-b", texts(1.0, 2.0, 4.0), table, [[0.5], [1], [5.5]])
    assert [record["value"] for record in found.predictions] == [0.5, 1.0, 5.5]
    assert [record["expected"] for record in found.predictions] == [1.0, 2.0, 4.0]
    assert found.submissions["STS-B.tsv"].splitlines()[1:] == ["0\t0.500", "1\t1.000", "2\t5.000"]
    # About the means 7 / 3 and 7 / 3: products of (-4, -1, 5) / 3 and (-11, -8, 19) / 6.
    assert found.metrics["pearson"] == pytest.approx((44 + 8 + 95) / np.sqrt(42 * (121 + 64 + 361)), rel=1e-12)
    assert found.metrics["spearman"] == pytest.approx(1.0, rel=1e-15)


def test_a_choice_is_the_best_of_its_rows_and_groups_are_measured_alone():
    pairs = (("a", "b"),) * 3
    examples = [
        ChoiceExample(id=f"f{number // 2}.txt-{number % 2}", place="", pairs=pairs, label=label, group=group)
        for number, (label, group) in enumerate([(0, "middle"), (1, "middle"), (2, "high")])
    ]
    table = table_of("race", [2] * 9, [0, 1, 2], labels=np.array([0, 1, 2]), rows_per_sample=3)
    found = scored("race", examples, table, np.log([[2], [1], [1], [5], [1], [1], [1], [1], [2]]))
    assert found.metrics == {"accuracy": 2 / 3, "accuracy_middle": 1 / 2, "accuracy_high": 1.0}
    assert [record["best"] for record in found.predictions] == [0, 0, 2]
    assert found.predictions[0]["scores"] == pytest.approx([0.5, 0.25, 0.25], rel=1e-6)
    assert json.loads(found.submissions["RACE.json"]) == {"f0.txt": ["A", "A"], "f1.txt": ["C"]}


QUESTIONS = [
    AnswerExample(id="q0", place="d:q0", question="?", context="red cat", answers=(Answer("Cat", 4),)),
    AnswerExample(id="q1", place="d:q1", question="?", context="red cat"),
]
SPANS = np.array([(-1, -1), (0, 3), (4, 7)] * 2, dtype=np.int32)


def test_an_answer_is_told_with_its_place_and_what_speaks_against_it():
    table = table_of("squad", [3, 3], [0, 1], spans=SPANS, labels=np.zeros((2, 2), dtype=np.int64))
    outputs = [[1, 1], [0, 0], [2, 2], [3, 1], [1, 1], [0, 0]]
    found = scored("squad", QUESTIONS, table, outputs)
    first, second = found.predictions
    assert {key: first[key] for key in ("answer", "start", "end", "score", "no_answer_score")} == {
        "answer": "cat",
        "start": 4,
        "end": 7,
        "score": 4.0,
        "no_answer_score": 2.0,
    }
    assert {key: second[key] for key in ("answer", "start", "end", "expected")} == {
        "answer": "",
        "start": None,
        "end": None,
        "expected": [],
    }
    assert (found.metrics["f1"], found.metrics["best_f1"], found.metrics["best_threshold"]) == (1.0, 1.0, -2.0)
    assert json.loads(found.submissions["predictions.json"]) == {"q0": "cat", "q1": ""}
    answered = scored("squad", QUESTIONS, table, outputs, null_threshold=2.0)
    assert (answered.predictions[1]["answer"], answered.metrics["f1"]) == ("red", 0.5)


def test_whether_a_question_may_have_no_answer_is_said_by_the_settings_or_the_examples():
    assert may_be_unanswerable(TaskConfig(name="squad"), QUESTIONS)
    assert not may_be_unanswerable(TaskConfig(name="squad"), QUESTIONS[:1])
    assert not may_be_unanswerable(TaskConfig(name="squad", unanswerable=False), QUESTIONS)
    assert may_be_unanswerable(TaskConfig(name="squad", unanswerable=True), QUESTIONS[:1])
    bare = [AnswerExample(id="q", place="", question="?", context="x", is_labelled=False)]
    assert not may_be_unanswerable(TaskConfig(name="squad"), bare)
    table = table_of("squad", [3], [0], spans=SPANS[:3])
    found = scored("squad", QUESTIONS[:1], table, [[9, 9], [0, 0], [2, 2]])
    assert set(found.predictions[0]) == {"id", "answer", "start", "end", "probability", "score", "expected"}
    assert found.metrics == {"exact_match": 1.0, "f1": 1.0}


def test_a_question_without_an_answer_is_refused_with_its_place_where_each_must_have_one():
    table = table_of("squad", [3, 3], [0, 1], spans=SPANS, labels=np.zeros((2, 2), dtype=np.int64))
    task = TaskConfig(name="squad", unanswerable=False)
    with pytest.raises(DataError, match=r"^d:q1: the question has no answer.*task\.unanswerable=true, or false"):
        score(task, QUESTIONS, table, np.zeros((6, 2)), labels=None)


def test_an_answer_without_a_place_is_measured_by_its_text():
    lost = AnswerExample(
        id="q", place="", question="?", context="red cat", answers=(Answer("the cat", UNKNOWN_PLACE),)
    )
    table = table_of("squad", [3], [0], spans=SPANS[:3], labels=np.full((1, 2), -100))
    found = scored("squad", [lost], table, [[0, 0], [0, 0], [2, 2]])
    assert (found.metrics, found.predictions[0]["expected"]) == ({"exact_match": 1.0, "f1": 1.0}, ["the cat"])


def test_tags_are_put_back_to_their_sentences():
    examples = [
        WordsExample(id="s0", place="", words=("a", "b"), tags=("B-x", "O"), group="one"),
        WordsExample(id="s1", place="", words=("c",), tags=("B-x",), group="two"),
    ]
    # A document in one row: [CLS] a b ##b c [SEP].
    table = table_of("token-classification", [6], [0], words=np.array([-1, 0, 1, -1, 2, -1]))
    best = np.eye(3)[[2, 1, 0, 2, 0, 2]]
    found = scored("token-classification", examples, table, best, "O", "B-x", "I-x")
    assert found.predictions[0] == {
        "id": "s0",
        "words": ["a", "b"],
        "tags": ["B-x", "O"],
        "expected": ["B-x", "O"],
    }
    assert found.predictions[1]["tags"] == ["O"]
    assert found.submissions["predictions.conll"] == "a B-x B-x\nb O O\n\nc B-x O\n\n"
    overall = {"f1": 2 / 3, "precision": 1.0, "recall": 1 / 2, "accuracy": 2 / 3}
    one = dict.fromkeys(("f1_one", "precision_one", "recall_one", "accuracy_one"), 1.0)
    two = dict.fromkeys(("f1_two", "precision_two", "recall_two", "accuracy_two"), 0.0)
    assert found.metrics == pytest.approx({**overall, **one, **two}, rel=1e-15)


@pytest.mark.parametrize(
    ("name", "example", "fields", "outputs", "labels"),
    [
        ("sst-2", TextExample(id="e", place="", text="x"), {}, [[1, 2]], ("negative", "positive")),
        ("multi-label", TextExample(id="e", place="", text="x"), {}, [[1, 2]], ("a", "b")),
        ("regression", TextExample(id="e", place="", text="x"), {}, [[1]], ()),
        ("race", ChoiceExample(id="e-0", place="", pairs=(("a", "b"),)), {}, [[1]], ()),
        (
            "squad",
            AnswerExample(id="e", place="", question="?", context="red cat", is_labelled=False),
            {"spans": SPANS[:3]},
            [[0, 0]] * 3,
            (),
        ),
        (
            "token-classification",
            WordsExample(id="e", place="", words=("a",)),
            {"words": np.array([-1, 0, -1])},
            [[0, 1]] * 3,
            ("O", "B-x"),
        ),
    ],
)
def test_without_labels_there_are_predictions_alone(name, example, fields, outputs, labels):
    found = scored(name, [example], table_of(name, [3], [0], **fields), outputs, *labels)
    assert found.metrics == {}
    assert "expected" not in found.predictions[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_no_numbers_name_the_first_example(value):
    labels = ("negative", "positive")
    outputs = [[0, 0], [0, value], [0, 0], [value, 0]]
    with pytest.raises(DataError, match=r"dev\.tsv:3.*'t2'.* 1 more of 4 outputs"):
        scored("sst-2", texts(*[None] * 4), table_of("sst-2", [3] * 4, [0, 2, 1, 3]), outputs, *labels)
    tokens = np.zeros((6, 2))
    tokens[4, 1] = value
    with pytest.raises(DataError, match=r"d:q1.*'q1'.* 0 more of 6 outputs"):
        scored("squad", QUESTIONS, table_of("squad", [3, 3], [0, 1], spans=SPANS), tokens)
    choices = [ChoiceExample(id=f"c{n}", place=f"f{n}", pairs=(("a", "b"),) * 2) for n in range(2)]
    with pytest.raises(DataError, match=r"f1.*'c1'"):
        scored("race", choices, table_of("race", [3] * 4, [0, 1], rows_per_sample=2), [[0], [0], [0], [value]])
