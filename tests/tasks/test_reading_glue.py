"""GLUE's nine tasks, from files as GLUE lays them out."""

from collections import Counter

import pytest

from megatron_bert_tp.tasks.task import TASKS
from tests.sources import real_data
from tests.tasks.reading import read, refusal, write

# A row of each file as GLUE distributes it: its header, the row, and what must be read from it.
LAYOUTS = {
    "cola": (None, "gj04\t0\t*\tThey drank the pub.", ("0", "They drank the pub.", None, "unacceptable")),
    "sst-2": ("sentence\tlabel", 'a dull "film" \t0', ("0", 'a dull "film" ', None, "negative")),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '1\t70\t71\t" One said .\tTwo " said .',
        ("0", '" One said .', 'Two " said .', "equivalent"),
    ),
    "sts-b": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "7\tnews\tMSRpar\t2012\t0\tnone\tnone\tA cat.\tA dog.\t2.750",
        ("7", "A cat.", "A dog.", 2.75),
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "133273\t213221\t213222\tHow?\tWhy?\t1",
        ("133273", "How?", "Why?", "duplicate"),
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "4\t31193\t31193n\tfiction\t( a )\t( b )\t(S a)\t(S b)\tIt rains.\tIt is dry.\tneutral\tcontradiction",
        ("4", "It rains.", "It is dry.", "contradiction"),
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        "9\tWho came?\tAnna came.\tentailment",
        ("9", "Who came?", "Anna came.", "entailment"),
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel",
        "3\tA.\tB.\tnot_entailment",
        ("3", "A.", "B.", "not_entailment"),
    ),
    "wnli": (
        "index\tsentence1\tsentence2\tlabel",
        "2\tIt fell.\tHe fell.\t1",
        ("2", "It fell.", "He fell.", "entailment"),
    ),
}
# Test files: no label, and CoLA has a header there.
TESTS = {
    "cola": ("index\tsentence", "5\tBill saw her.", ("5", "Bill saw her.", None)),
    "sst-2": ("index\tsentence", "0\tuneasy mishmash .", ("0", "uneasy mishmash .", None)),
    "qqp": ("id\tquestion1\tquestion2", "8\tWhat?\tWhen?", ("8", "What?", "When?")),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2",
        "6\t1\t1n\ttravel\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tOne.\tTwo.",
        ("6", "One.", "Two."),
    ),
    "wnli": ("index\tsentence1\tsentence2", "1\tA.\tB.", ("1", "A.", "B.")),
}
RTE = "index\tsentence1\tsentence2\tlabel"
QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"


def lines_of(header, *rows):
    return [*([header] if header else []), *rows]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_row_is_read_as_glue_lays_it_out(name, end, tmp_path):
    header, row, expected = LAYOUTS[name]
    path = write(tmp_path / "dev.tsv", *lines_of(header, row), end=end)
    (example,) = read(name, path).examples
    assert (example.id, example.text, example.pair, example.label) == expected
    assert example.place == f"{path}:{2 if header else 1}"
    assert TASKS[name].labels is None or example.label in TASKS[name].labels


@pytest.mark.parametrize("name", TESTS)
def test_a_test_file_has_no_labels(name, tmp_path):
    header, row, expected = TESTS[name]
    (example,) = read(name, write(tmp_path / "test.tsv", header, row), part="test").examples
    assert (example.id, example.text, example.pair) == expected
    assert example.label is None


@pytest.mark.parametrize("name", sorted(LAYOUTS.keys() - {"cola"}))
def test_the_order_of_the_columns_does_not_matter(name, tmp_path):
    header, row, expected = LAYOUTS[name]
    turned = ["\t".join(reversed(line.removeprefix("\ufeff").split("\t"))) for line in (header, row)]
    (example,) = read(name, write(tmp_path / "dev.tsv", *turned)).examples
    assert (example.id, example.text, example.pair, example.label) == expected


# Independent counts: lines that `wc -l` gives, less the header, and a cut of the label column.
REAL = [
    ("sst-2", "SST-2/train.tsv", "label", {"1": "positive", "0": "negative"}),
    ("sst-2", "SST-2/dev.tsv", "label", {"1": "positive", "0": "negative"}),
    ("mrpc", "MRPC/train.tsv", "Quality", {"1": "equivalent", "0": "not_equivalent"}),
    ("mrpc", "MRPC/dev.tsv", "Quality", {"1": "equivalent", "0": "not_equivalent"}),
    ("rte", "RTE/train.tsv", "label", None),
    ("rte", "RTE/dev.tsv", "label", None),
]


@pytest.mark.parametrize(("name", "file", "column", "names"), REAL, ids=[row[1] for row in REAL])
def test_all_rows_of_a_real_file_are_read(name, file, column, names):
    path = real_data(f"glue/{file}")
    header, *rows = [line.split("\t") for line in path.read_text(encoding="utf-8-sig").split("\n")[:-1]]
    given = Counter(row[header.index(column)] for row in rows)
    reading = read(name, path)
    assert Counter(example.label for example in reading.examples) == {
        (names or {}).get(label, label): count for label, count in given.items()
    }
    texts = [header.index(each) for each in ("sentence", "#1 String", "sentence1") if each in header]
    assert [example.text for example in reading.examples] == [row[texts[0]] for row in rows]
    assert reading.notes == ()


@pytest.mark.parametrize(("part", "count"), [("train", 5749), ("dev", 1500)])
def test_the_scores_of_sts_b_are_numbers_from_0_to_5(part, count):
    path = real_data(f"glue/STS-B/{part}.tsv")
    scores = [line.split("\t")[-1] for line in path.read_text(encoding="utf-8").split("\n")[1:-1]]
    found = [example.label for example in read("sts-b", path).examples]
    assert found == [float(score) for score in scores]
    assert len(found) == count
    assert (min(found), max(found)) == (0.0, 5.0)


def test_the_real_test_file_of_mrpc_has_the_ids_of_its_index():
    reading = read("mrpc", real_data("glue/MRPC/test.tsv"), part="test")
    assert [example.id for example in reading.examples] == [str(number) for number in range(1725)]
    assert {example.label for example in reading.examples} == {None}


def test_matched_and_mismatched_are_groups_whose_ids_do_not_clash(tmp_path):
    header, row, _ = LAYOUTS["mnli"]
    paths = [write(tmp_path / f"dev_{part}.tsv", header, row) for part in ("matched", "mismatched")]
    assert [(e.group, e.id) for e in read("mnli", *paths).examples] == [
        ("matched", "matched:4"),
        ("mismatched", "mismatched:4"),
    ]
    assert [(e.group, e.id) for e in read("mnli", paths[1]).examples] == [("mismatched", "4")]


def test_rows_of_mnli_without_a_gold_label_are_passed_over_and_told(tmp_path):
    header, row, _ = LAYOUTS["mnli"]
    undecided = row.replace("contradiction", "-").replace("4\t", "5\t", 1)
    path = write(tmp_path / "dev_matched.tsv", header, undecided, row)
    reading = read("mnli", path)
    assert [example.id for example in reading.examples] == ["4"]
    assert reading.notes == (f"{path}: 1 of 2 rows without a label ('-') passed over",)
    unlabelled = read("mnli", path, part="test").examples
    assert [example.label for example in unlabelled] == [None, "contradiction"]


def test_a_file_whose_rows_are_all_passed_over_is_refused_with_the_reason(tmp_path):
    header, row, _ = LAYOUTS["mnli"]
    path = write(tmp_path / "dev_matched.tsv", header, row.replace("contradiction", "-"))
    told = f"{path}: has no example of the task; {path}: 1 of 1 row without a label ('-') passed over;"
    assert refusal("mnli", path).startswith(told)


def test_a_few_broken_rows_of_qqp_are_passed_over_and_told(tmp_path):
    rows = [f"{n}\t1\t2\tHow {n}?\tWhy {n}?\t{n % 2}" for n in range(2001)]
    rows[70] = "70\t1\t2\tHow"
    reading = read("qqp", path := write(tmp_path / "train.tsv", QQP, *rows))
    assert [example.id for example in reading.examples] == [str(n) for n in range(2001) if n != 70]
    told = f"1 of 2001 rows with too few columns passed over, the first at {path}:72"
    assert reading.notes == (f"{path}: {told}",)
    rows[71] = rows[72] = "71"
    assert f"3 of 2001 rows with too few columns, the first at {path}:72; fewer than 1 in 1000" in (
        refusal("qqp", write(path, QQP, *rows))
    )


def test_one_broken_row_of_a_thousand_is_too_many(tmp_path):
    rows = [f"{n}\t1\t2\tHow {n}?\tWhy {n}?\t0" for n in range(1000)]
    rows[3] = "3\t1"
    assert "1 of 1000 rows" in refusal("qqp", write(tmp_path / "train.tsv", QQP, *rows))


def test_a_row_with_too_many_columns_is_refused_even_in_qqp(tmp_path):
    rows = [f"{n}\t1\t2\tHow {n}?\tWhy {n}?\t0" for n in range(1200)]
    rows[3] += "\t0"
    path = write(tmp_path / "train.tsv", QQP, *rows)
    assert refusal("qqp", path).startswith(f"{path}:5: the row has 7 columns, but there must be 6 (id, qid1,")


def test_one_empty_text_of_a_pair_is_kept_and_told_where_it_is_rare(tmp_path):
    rows = [f"{n}\t1\t2\tHow {n}?\tWhy {n}?\t0" for n in range(1200)]
    rows[3] = "3\t1\t2\tHow?\t\t0"
    reading = read("qqp", path := write(tmp_path / "train.tsv", QQP, *rows))
    assert reading.examples[3].pair == ""
    assert reading.notes == (
        f"{path}: 1 of 1200 rows with one text empty kept as they are, the first at {path}:5",
    )
    assert "1 of 3 rows with one text empty" in refusal("qqp", write(path, QQP, *rows[2:5]))
    rows[3] = "3\t1\t2\t \t\t0"
    assert refusal("qqp", write(path, QQP, *rows)).startswith(f"{path}:5: 'question1' is empty")


BAD = [
    (
        "sst-2",
        ["sentence\tlabel", "good\t1", "fair\t2"],
        ":3: the label '2' of 'label' is outside the set; there are '0'",
    ),
    ("sst-2", ["sentence\tlabel", "good\tpositive"], ":2: the label 'positive' of 'label' is outside the set"),
    (
        "rte",
        [RTE, "0\ta\tb\tentailmnt"],
        ":2: the label 'entailmnt' of 'label' is outside the set; did you mean 'entailment'?",
    ),
    ("rte", [RTE, "0\ta\tb\t1"], ":2: the label '1' of 'label' is outside the set"),
    ("rte", [RTE, "0\ta\tb\t"], ":2: 'label' has no label"),
    (
        "rte",
        ["index\tsentence_1\tsentence2\tlabel"],
        ":1: the column 'sentence1' is missing; did you mean 'sentence_1'?",
    ),
    (
        "rte",
        ["index\tsentence1\tsentence2\tLABEL", "0\ta\tb\tx"],
        ":1: the column 'label' is missing; did you mean 'LABEL'?",
    ),
    ("rte", [RTE, "0\ta\tentailment"], ":2: the row has 3 columns, but there must be 4"),
    ("rte", [RTE, "0\ta\tb\tentailment", "0\ta\tb\tentailment"], ":3: the id '0' is also that of "),
    ("sts-b", ["sentence1\tsentence2\tscore", "a\tb\tnan"], ":2: 'score' must be a finite number, not 'nan'"),
    ("sts-b", ["sentence1\tsentence2\tscore", "a\tb\t4,5"], ":2: 'score' must be a finite number, not '4,5'"),
    (
        "sts-b",
        ["sentence1\tsentence2\tscore", "a\tb\t5.000", "a\tb\t5.001"],
        ":3: the score '5.001' of 'score' is not from 0 to 5; mend the row",
    ),
    ("sts-b", ["sentence1\tsentence2\tscore", "a\tb\t-1"], ":2: the score '-1' of 'score' is not from 0 to 5"),
    ("cola", ["gj04\t1\t\tFine.", "gj04\t0\tBad."], ":2: the row has 3 columns, but there must be 4"),
    ("cola", ["gj04\tyes\t\tFine."], ":1: the label 'yes' of 'label' is outside the set"),
    ("cola", ["gj04\t1\t\t "], ":1: 'sentence' is empty"),
    ("sst-2", ["sentence\tlabel"], ": has no example of the task"),
    ("sst-2", [], ": has no example of the task"),
]


@pytest.mark.parametrize(("name", "lines", "message"), BAD, ids=[row[2][:60] for row in BAD])
def test_a_bad_file_is_refused_with_its_line(name, lines, message, tmp_path):
    path = write(tmp_path / "dev.tsv", *lines)
    assert refusal(name, path).startswith(f"{path}{message}")


def test_validation_needs_labels_where_a_test_file_does_not(tmp_path):
    header, row, _ = TESTS["wnli"]
    path = write(tmp_path / "test.tsv", header, row)
    assert refusal("wnli", path).startswith(
        f"{path}:1: the column 'label' is missing; there are 'index', 'sentence1'"
    )


def test_no_row_of_a_test_part_is_passed_over(tmp_path):
    """Each has its index in what is handed in."""
    rows = [f"{n}\tHow {n}?\tWhy {n}?" for n in range(2001)]
    rows[70] = "70\tHow"
    path = write(tmp_path / "test.tsv", "id\tquestion1\tquestion2", *rows)
    assert f"{path}:72: the row has 2 columns, but there must be 3" in refusal("qqp", path, part="test")
    rows[70] = "70\tHow\t"
    reading = read("qqp", write(path, "id\tquestion1\tquestion2", *rows), part="test")
    assert len(reading.examples) == 2001
    assert reading.notes == (
        f"{path}: 1 of 2001 rows with one text empty kept as they are, the first at {path}:72",
    )


def test_another_file_is_told_in_few_words(tmp_path):
    path = write(tmp_path / "train.tsv", '{"data": "' + "many words " * 10_000 + '"}')
    assert len(refusal("sst-2", path)) < 600
