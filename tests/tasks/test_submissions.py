"""Files for benchmarks, read back."""

import csv
import io
import json

import pytest

from megatron_bert_tp.tasks import submissions
from megatron_bert_tp.tasks.answers import Answers, Candidate
from megatron_bert_tp.tasks.examples import ChoiceExample, Example, WordsExample
from megatron_bert_tp.tasks.task import TASKS
from tests.tasks.reading import read, write

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


MNLI = "index\tsentence1\tsentence2"


@pytest.mark.parametrize("folder", ["plain", "mismatched_vs_matched", "mismatched", "matched"])
def test_the_parts_of_mnli_have_a_file_each_whatever_their_folder_is_called(folder, tmp_path):
    matched = write(tmp_path / folder / "test_matched.tsv", MNLI, "0\ta\tb")
    mismatched = write(tmp_path / folder / "test_mismatched.tsv", MNLI, "0\ta\tb", "1\tc\td")
    examples = read("mnli", matched, mismatched, part="test").examples
    files = submissions.classes("mnli", examples, ["neutral", "entailment", "contradiction"])
    assert {name: table(content)[1:] for name, content in files.items()} == {
        "MNLI-m.tsv": [["0", "neutral"]],
        "MNLI-mm.tsv": [["0", "entailment"], ["1", "contradiction"]],
    }
    for path, file in ((matched, "MNLI-m.tsv"), (mismatched, "MNLI-mm.tsv")):
        alone = read("mnli", path, part="test").examples
        assert list(submissions.classes("mnli", alone, ["neutral"] * len(alone))) == [file]


def test_files_of_mnli_that_are_neither_part_do_not_share_one(tmp_path):
    def files_of(*names):
        paths = [write(tmp_path / "mismatched" / f"{name}.tsv", MNLI, "0\ta\tb") for name in names]
        examples = read("mnli", *paths, part="test").examples
        return list(submissions.classes("mnli", examples, ["neutral"] * len(names)))

    assert files_of("val_m", "val_mm") == ["MNLI-val_m.tsv", "MNLI-val_mm.tsv"]
    assert files_of("dev_matched", "dev_mismatched", "new") == ["MNLI-m.tsv", "MNLI-mm.tsv", "MNLI-new.tsv"]
    assert files_of("m", "dev_matched") == ["MNLI-m.tsv", "MNLI-matched.tsv"]
    assert files_of("new") == ["MNLI-m.tsv"]


def test_several_files_of_a_task_have_a_submission_each(tmp_path):
    paths = [write(tmp_path / name, "index\tsentence", "0\tgood", "1\tbad") for name in ("a.tsv", "b.tsv")]
    examples = read("sst-2", *paths, part="test").examples
    files = submissions.classes("sst-2", examples, ["positive", "negative", "negative", "positive"])
    assert {name: table(content)[1:] for name, content in files.items()} == {
        "SST-2-a.tsv": [["0", "1"], ["1", "0"]],
        "SST-2-b.tsv": [["0", "0"], ["1", "1"]],
    }
    pairs = [write(tmp_path / f"s{n}.tsv", "index\tsentence1\tsentence2", "0\ta\tb") for n in (1, 2)]
    files = submissions.numbers("sts-b", read("sts-b", *pairs, part="test").examples, [1.0, 2.0])
    assert {name: table(content)[1:] for name, content in files.items()} == {
        "STS-B-s1.tsv": [["0", "1.000"]],
        "STS-B-s2.tsv": [["0", "2.000"]],
    }


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


def test_white_space_within_a_word_is_no_column():
    examples = [WordsExample(id="0", place="", words=("New\u00a0York", "a\nb"), tags=("B-x", "O"))]
    (content,) = submissions.columns(examples, [("O", "O")]).values()
    assert content == "New_York B-x O\na_b O O\n\n"
