"""CSV, TSV and JSON lines for classification, several labels, numbers and choices."""

import csv
import json

import pytest

from megatron_bert_tp.tasks.reading.lines import LONGEST_LINE
from tests.tasks.reading import read, refusal, task, write

PAIR = {"text": "premise", "pair": "hypothesis", "label": "verdict", "id": "key"}
SWAG = {
    "text": "sent1",
    "pair": "sent2",
    "label": "label",
    "choices": ("ending0", "ending1", "ending2"),
}


def json_lines(path, *rows):
    return write(path, *(json.dumps(row) for row in rows))


def labels(reading):
    return [example.label for example in reading.examples]


# Classification


def test_csv_that_pythons_writer_quotes_is_read_back(tmp_path):
    texts = ['He said "no", twice', "two\nlines", "plain", "tab\there", "  blanks kept ", "'single'"]
    path = tmp_path / "train.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["label", "text"], *(["x", text] for text in texts)])
    reading = read("classification", path)
    assert [example.text for example in reading.examples] == texts
    # The second text takes lines 3 and 4.
    assert [example.place for example in reading.examples] == [f"{path}:{line}" for line in (2, 3, 5, 6, 7, 8)]
    assert [example.id for example in reading.examples] == ["0", "1", "2", "3", "4", "5"]


def test_a_quote_in_tsv_is_a_character(tmp_path):
    path = write(tmp_path / "train.tsv", "text\tlabel", '"open\tx', 'a "b" c"\ty')
    assert [(e.text, e.label) for e in read("classification", path).examples] == [
        ('"open', "x"),
        ('a "b" c"', "y"),
    ]


def test_a_text_of_csv_may_be_as_long_as_a_line_and_the_limit_of_the_library_stays(tmp_path):
    before, text = csv.field_size_limit(), "word " * 100_000
    path = write(tmp_path / "train.csv", "text,label", f"{text},x", "b,y")
    assert len(text) > before
    assert [example.text for example in read("classification", path).examples] == [text, "b"]
    assert csv.field_size_limit() == before
    refusal("classification", write(tmp_path / "bad.csv", "text,label", '"a"b,y'))
    assert csv.field_size_limit() == before


def test_a_text_of_csv_that_never_ends_is_refused_with_the_limit(tmp_path):
    line = "word " * (LONGEST_LINE // 8)
    path = write(tmp_path / "train.csv", "text,label", f'"{line}', f'{line}",x')
    told = f"the row that begins here is no CSV (field larger than field limit ({LONGEST_LINE}))"
    assert refusal("classification", path).startswith(f"{path}:2: {told}")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".ndjson"])
def test_the_columns_of_json_lines_are_their_keys(suffix, tmp_path):
    row = {"key": 17, "premise": "It rains.", "hypothesis": "It is wet.", "verdict": "yes", "more": [1]}
    path = json_lines(tmp_path / f"train{suffix}", row, {**row, "key": "b"})
    first, second = read(task("classification", columns=PAIR), path).examples
    assert (first.id, first.text, first.pair, first.label) == ("17", "It rains.", "It is wet.", "yes")
    assert second.id == "b"
    assert second.place == f"{path}:2"


@pytest.mark.parametrize(
    ("value", "name"), [(1, "1"), (1.0, "1"), (1.5, "1.5"), (-2, "-2"), (True, "true"), (" a b ", "a b")]
)
def test_a_label_of_json_is_named_by_its_text_and_whole_numbers_without_a_point(value, name, tmp_path):
    path = json_lines(tmp_path / "train.jsonl", {"text": "a", "label": value})
    assert labels(read("classification", path)) == [name]


def test_a_label_of_csv_is_its_text(tmp_path):
    path = write(tmp_path / "train.csv", "text,label", "a,1.0", "b, 1 ", "c,01")
    assert labels(read("classification", path)) == ["1.0", "1", "01"]


def test_without_labels_those_that_are_there_are_taken(tmp_path):
    path = json_lines(
        tmp_path / "test.jsonl", {"text": "a", "label": "x"}, {"text": "b"}, {"text": "c", "label": None}
    )
    assert labels(read("classification", path, part="test")) == ["x", None, None]
    assert labels(read("classification", write(tmp_path / "t.csv", "text,label", "a,"), part="test")) == [None]
    assert labels(read("classification", write(tmp_path / "u.csv", "text", "a"), part="test")) == [None]


def test_blank_lines_are_passed_over_and_told(tmp_path):
    path = write(tmp_path / "train.csv", "text,label", "a,x", "", "b,y", "")
    reading = read("classification", path)
    assert [(example.id, example.place) for example in reading.examples] == [
        ("0", f"{path}:2"),
        ("1", f"{path}:4"),
    ]
    assert reading.notes == (f"{path}: 2 blank lines passed over",)


# Several labels


def test_several_labels_are_a_list_or_a_text_cut_at_the_separator(tmp_path):
    path = json_lines(
        tmp_path / "train.jsonl",
        {"text": "a", "label": ["x", 2]},
        {"text": "b", "label": []},
        {"text": "c", "label": "x, y ,x"},
        {"text": "d", "label": ""},
    )
    assert labels(read("multi-label", path)) == [("x", "2"), (), ("x", "y"), ()]
    path = write(tmp_path / "train.tsv", "text\tlabel", "a\tx|y,z", "b\t")
    assert labels(read(task("multi-label", separator="|"), path)) == [("x", "y,z"), ()]


def test_several_labels_may_be_unknown_where_they_are_not_needed(tmp_path):
    path = json_lines(tmp_path / "test.jsonl", {"text": "a"}, {"text": "b", "label": []})
    assert labels(read("multi-label", path, part="test")) == [None, ()]


def test_an_empty_text_is_no_label_where_labels_are_not_needed_and_else_says_that_none_holds(tmp_path):
    path = write(tmp_path / "part.csv", "text,label", "a,", 'b,"x,y"', "c, ")
    assert labels(read("multi-label", path, part="test")) == [None, ("x", "y"), None]
    for part in ("training", "validation"):
        assert labels(read("multi-label", path, part=part)) == [(), ("x", "y"), ()]


# Numbers


def test_numbers_are_read_from_text_and_json(tmp_path):
    path = write(tmp_path / "train.csv", "text,label", "a,2.5", "b,-1e-3", "c,7")
    assert labels(read("regression", path)) == [2.5, -0.001, 7.0]
    path = json_lines(tmp_path / "train.jsonl", {"text": "a", "label": 3}, {"text": "b", "label": "0.25"})
    assert labels(read("regression", path)) == [3.0, 0.25]


# Choices


def test_a_choice_follows_the_beginning_that_all_have(tmp_path):
    path = write(
        tmp_path / "train.csv",
        "video-id,sent1,sent2,ending0,ending1,ending2,label",
        'v,"He sits, then",He,stands.,runs.,"eats, too.",2',
    )
    (example,) = read(task("multiple-choice", columns=SWAG), path).examples
    assert example.pairs == (
        ("He sits, then", "He stands."),
        ("He sits, then", "He runs."),
        ("He sits, then", "He eats, too."),
    )
    assert example.label == 2


def test_choices_may_be_a_list_of_json_without_a_beginning(tmp_path):
    columns = {"text": "question", "choices": ("options",), "label": "answer"}
    rows = [{"question": "Why?", "options": ["a", "b"], "answer": n} for n in (0, 1.0, "1")]
    path = json_lines(tmp_path / "train.jsonl", *rows)
    reading = read(task("multiple-choice", columns=columns), path)
    assert reading.examples[0].pairs == (("Why?", "a"), ("Why?", "b"))
    assert labels(reading) == [0, 1, 1]


def test_4_options_beside_3_are_refused_with_both_places(tmp_path):
    columns = {"choices": ("options",)}
    rows = [{"text": "Why?", "options": ["a"] * n, "label": 0} for n in (3, 3, 4)]
    path = json_lines(tmp_path / "train.jsonl", *rows)
    told = refusal(task("multiple-choice", columns=columns), path)
    assert told.startswith(f"{path}:3: has 4 choices, but {path}:1 has 3;")


CHOICE = task("multiple-choice", columns={"choices": ("a", "b")})
LIST = task("multiple-choice", columns={"choices": ("options",)})
BAD = [
    (
        "classification",
        ".csv",
        ["text,label", "a,x", "b"],
        ":3: the row has 1 column, but there must be 2 (text, label)",
    ),
    (
        "classification",
        ".csv",
        ["text,lable", "a,x"],
        ":1: the column 'label' is missing; did you mean 'lable'? there are 'text', 'lable'",
    ),
    ("classification", ".csv", ["text,label,text", "a,x,b"], ":1: the column 'text' is there twice"),
    (
        "classification",
        ".csv",
        ["text,label", "a,x", '"b,y', "c,z"],
        ":3: the row that begins here is no CSV (unexpected end",
    ),
    ("classification", ".csv", ["text,label", '"a"b,y'], ":2: the row that begins here is no CSV ("),
    ("classification", ".csv", ["text,label", "a,x", " ,y"], ":3: 'text' is empty"),
    ("classification", ".csv", ["text,label", "a,x", "b,"], ":3: 'label' has no label"),
    (
        "classification",
        ".tsv",
        ["text,label", "a,x"],
        ":1: the column 'text' is missing; there are 'text,label'; part the cells as the format wants, not by ','",
    ),
    (
        "classification",
        ".csv",
        ["text;label", "a;x"],
        ":1: the column 'text' is missing; there are 'text;label'; part the cells as the format wants, not by ';'",
    ),
    ("classification", ".txt", ["text,label"], ": the name of a table must end in .csv, .tsv, .jsonl"),
    (
        "classification",
        ".jsonl",
        ['{"text": "a", "label": "x"}', "[1]"],
        ":2: each line must be one JSON object, but it is [1]",
    ),
    (
        "classification",
        ".jsonl",
        ['{"text": "a", "label": "x"}', '{"text": "b"}'],
        ":2: the column 'label' is missing; there are 'text'",
    ),
    (
        "classification",
        ".jsonl",
        ['{"text": "a", "label": "x"}', '{"text": "b", '],
        ":2: not JSON (Expecting property name",
    ),
    ("classification", ".jsonl", ['{"text": "a", "text": "b", "label": 1}'], ":1: the key 'text' is there twice"),
    ("classification", ".jsonl", ['{"text": 5, "label": "x"}'], ":1: 'text' must be a text, but it is 5"),
    ("classification", ".jsonl", ['{"text": "a", "label": null}'], ":1: 'label' has no label"),
    (
        "classification",
        ".jsonl",
        ['{"text": "a", "label": {"x": 1}}'],
        ":1: 'label' must be a text or a number, but it is {'x': 1}",
    ),
    (
        "classification",
        ".jsonl",
        ['{"text": "a \\ud800", "label": "x"}'],
        ":1: an escape is half of a surrogate pair",
    ),
    ("classification", ".jsonl", [f'{{"text": {"[" * 100_000}'], ":1: nested too deeply"),
    ("multi-label", ".csv", ["text,label", 'a,"x,,y"'], ":2: one of the labels of 'label' is empty ('x,,y')"),
    ("multi-label", ".jsonl", ['{"text": "a", "label": 4}'], ":1: 'label' must be a list or a text, not 4"),
    ("multi-label", ".jsonl", ['{"text": "a", "label": null}'], ":1: 'label' has no label"),
    ("regression", ".csv", ["text,label", "a,inf"], ":2: 'label' must be a finite number, not 'inf'"),
    ("regression", ".csv", ["text,label", "a,1_0"], ":2: 'label' must be a finite number, not '1_0'"),
    ("regression", ".jsonl", ['{"text": "a", "label": NaN}'], ":1: NaN is no number of JSON"),
    ("regression", ".jsonl", ['{"text": "a", "label": 1e999}'], ":1: 'label' must be a finite number, not inf"),
    ("regression", ".jsonl", ['{"text": "a", "label": true}'], ":1: 'label' must be a finite number, not True"),
    (
        CHOICE,
        ".csv",
        ["text,a,b,label", "t,x,y,2"],
        ":2: the label '2' of 'label' is none of the choices, which are 0, 1",
    ),
    (CHOICE, ".csv", ["text,a,b,label", "t,x,y,-1"], ":2: the label '-1' of 'label' is none of the choices"),
    (CHOICE, ".csv", ["text,a,b,label", "t,x,y,0.5"], ":2: the label '0.5' of 'label' is none of the choices"),
    (CHOICE, ".csv", ["text,a,b,label", "t,x,,0"], ":2: 'b' is empty"),
    (CHOICE, ".csv", ["text,a,label", "t,x,0"], ":1: the column 'b' is missing; "),
    (
        LIST,
        ".jsonl",
        ['{"text": "a", "options": ["x"], "label": 0}'],
        ":1: there must be two choices or more, not 1",
    ),
    (
        LIST,
        ".jsonl",
        ['{"text": "a", "options": ["x", 1], "label": 0}'],
        ":1: 'options' holds 1, which is no text",
    ),
    (
        LIST,
        ".csv",
        ["text,options,label", "t,x,0"],
        ":2: 'options' must be a list of texts, but it is 'x'; give JSON lines",
    ),
    ("multiple-choice", ".csv", ["text,label", "t,0"], ":2: task.columns.choices is not set"),
    ("regression", ".csv", ["text,label"], ": has no example of the task"),
    (
        "regression",
        ".json",
        ["[", "{}]"],
        ":1: this is a JSON array; write one object a line",
    ),
    ("regression", ".jsonl", [f'{{"text": "a", "label": {"1" * 5000}}}'], ":1: Exceeds the limit (4300 digits)"),
    ("regression", ".json", ["", '[{"text": "a", "label": 1}]'], ":2: this is a JSON array; write one object"),
]


@pytest.mark.parametrize(("given", "suffix", "lines", "message"), BAD, ids=[row[3][:60] for row in BAD])
def test_a_bad_table_is_refused_with_its_line(given, suffix, lines, message, tmp_path):
    path = write(tmp_path / f"train{suffix}", *lines)
    assert refusal(given, path).startswith(f"{path}{message}")


@pytest.mark.parametrize(("separator", "text"), [("space", "a b"), ("tab", "a\tb"), (";", "a;b")])
def test_labels_may_be_parted_by_blanks(tmp_path, separator, text):
    path = write(tmp_path / "train.csv", "text,label", f'x,"{text}"')
    (example,) = read(task("multi-label", separator=separator), path).examples
    assert example.label == ("a", "b")


@pytest.mark.parametrize("row", ["[1, 0, 1]", "[0, 0, 0]", '"0,1,1"'])
def test_a_vector_of_zeros_and_ones_is_not_taken_for_names(tmp_path, row):
    named = '{"text": "x", "label": ["y", "z", "y"]}'
    path = write(tmp_path / "train.jsonl", named, f'{{"text": "x", "label": {row}}}')
    assert f"{path}:2: 'label' looks like a vector of 0 and 1" in refusal("multi-label", path)
