"""Files for benchmarks, read back."""

import csv
import io
import json

import pytest

from megatron_bert_tp.tasks import submissions
from megatron_bert_tp.tasks.answers import Answers, Candidate
from megatron_bert_tp.tasks.examples import ChoiceExample, Example, WordsExample
from megatron_bert_tp.tasks.task import TASKS

GLUE_CLASSES = ("cola", "sst-2", "mrpc", "qqp", "mnli", "qnli", "rte", "wnli")


def made(*ids: str, place: str = "test.tsv:2", group: str = "") -> list[Example]:
    return [Example(id=name, place=place, group=group) for name in ids]


def table(content: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(content), delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.mark.parametrize(
    ("name", "file", "said"),
    [
        ("cola", "CoLA.tsv", {"unacceptable": "0", "acceptable": "1"}),
        ("sst-2", "SST-2.tsv", {"negative": "0", "positive": "1"}),
        ("mrpc", "MRPC.tsv", {"not_equivalent": "0", "equivalent": "1"}),
        ("qqp", "QQP.tsv", {"not_duplicate": "0", "duplicate": "1"}),
        ("wnli", "WNLI.tsv", {"not_entailment": "0", "entailment": "1"}),
        ("mnli", "MNLI-m.tsv", {name: name for name in ("entailment", "neutral", "contradiction")}),
        ("qnli", "QNLI.tsv", {name: name for name in ("entailment", "not_entailment")}),
        ("rte", "RTE.tsv", {name: name for name in ("entailment", "not_entailment")}),
    ],
)
def test_glue_has_numbers_or_names(name, file, said):
    files = submissions.classes(name, made(*map(str, range(len(said)))), list(said))
    rows = [[str(number), value] for number, value in enumerate(said.values())]
    assert {key: table(content) for key, content in files.items()} == {file: [["index", "prediction"], *rows]}


def test_all_of_glue_has_a_file():
    for name in GLUE_CLASSES:
        labels = TASKS[name].labels
        assert labels is not None
        assert len(submissions.classes(name, made("0"), [labels[0]])) == 1


def test_classes_that_are_not_those_of_glue_have_no_file():
    assert submissions.classes("sst-2", made("0"), ["mixed"]) == {}
    assert submissions.classes("trec", made("0"), ["HUM"]) == {}
    assert submissions.numbers("regression", made("0"), [1.0]) == {}
    assert submissions.choices("multiple-choice", made("0"), [1]) == {}


def test_the_parts_of_mnli_have_a_file_each():
    both = made("0", place="a.tsv:2", group="test_matched") + made(
        "0", "1", place="b.tsv:2", group="test_mismatched"
    )
    files = submissions.classes("mnli", both, ["neutral", "entailment", "contradiction"])
    assert {name: table(content)[1:] for name, content in files.items()} == {
        "MNLI-m.tsv": [["0", "neutral"]],
        "MNLI-mm.tsv": [["0", "entailment"], ["1", "contradiction"]],
    }
    alone = submissions.classes("mnli", made("0", place="test_mismatched.tsv:2"), ["neutral"])
    assert list(alone) == ["MNLI-mm.tsv"]


def test_the_index_is_that_of_the_file_or_the_place_in_it():
    assert table(submissions.classes("rte", made("7", "9"), ["entailment"] * 2)["RTE.tsv"])[1:] == [
        ["7", "entailment"],
        ["9", "entailment"],
    ]
    for ids, expected in ((("test:7", "test:9"), ["7", "9"]), (("seven", "9"), ["0", "1"])):
        content = submissions.classes("rte", made(*ids), ["entailment"] * 2)["RTE.tsv"]
        assert [row[0] for row in table(content)[1:]] == expected


def test_similarities_are_between_0_and_5_with_three_decimals():
    files = submissions.numbers("sts-b", made(*"0123"), [-0.25, 5.125, 2.34567, 5e-4])
    assert table(files["STS-B.tsv"])[1:] == [["0", "0.000"], ["1", "5.000"], ["2", "2.346"], ["3", "0.001"]]


def test_race_has_letters_by_file_in_the_order_of_the_questions():
    pairs = (("a", "b"),) * 4
    names = ["high1.txt-0", "high1.txt-1", "my-middle-2.txt-0"]
    examples = [ChoiceExample(id=name, place="", pairs=pairs) for name in names]
    files = submissions.choices("race", examples, [0, 3, 1])
    assert json.loads(files["RACE.json"]) == {"high1.txt": ["A", "D"], "my-middle-2.txt": ["B"]}


def test_columns_are_read_by_conlleval():
    examples = [
        WordsExample(id="0", place="", words=("Zürich", "is"), tags=("B-x", "O")),
        WordsExample(id="1", place="", words=("big",), tags=("O",)),
    ]
    files = submissions.columns(examples, [("B-x", "B-y"), ("O",)])
    assert files == {"predictions.conll": "Zürich B-x B-x\nis O B-y\n\nbig O O\n\n"}
    bare = [WordsExample(id="0", place="", words=("Zürich", "is"))]
    assert submissions.columns(bare, [("B-x", "O")]) == {"predictions.conll": "Zürich B-x\nis O\n\n"}


def candidate(text: str, start: int | None, score: float) -> Candidate:
    end = None if start is None else start + len(text)
    return Candidate(
        text=text, start=start, end=end, start_logit=score, end_logit=0.0, score=score, probability=0.5
    )


def test_answers_are_what_the_evaluation_of_squad_reads():
    span, null = candidate('東京 "a"', 3, 2.0), candidate("", None, 1.0)
    examples = made("q1", "q2")
    found = [Answers((span, null), span, -1.0), Answers((null, span), span, 0.5)]
    files = {
        name: json.loads(content) for name, content in submissions.answers(examples, found, threshold=0).items()
    }
    assert files["predictions.json"] == {"q1": '東京 "a"', "q2": ""}
    assert files["null_odds.json"] == {"q1": -1.0, "q2": 0.5}
    assert files["nbest_predictions.json"]["q2"] == [
        {"text": "", "probability": 0.5, "start_logit": 1.0, "end_logit": 0.0},
        {"text": '東京 "a"', "probability": 0.5, "start_logit": 2.0, "end_logit": 0.0},
    ]
    # Its scripts open files in the encoding of the machine, whatever that is.
    assert all(content.isascii() for content in submissions.answers(examples, found, threshold=0).values())
    always = [Answers((span,), span, None)]
    assert "null_odds.json" not in submissions.answers(examples[:1], always, threshold=0)
