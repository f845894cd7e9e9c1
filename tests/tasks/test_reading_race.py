"""RACE's folders of articles."""

import json
from collections import Counter

import pytest

from tests.sources import real_data
from tests.tasks.reading import read, refusal, write

ARTICLE = {
    "id": "high7.txt",
    "article": "Anna met Bo.\nThey left.",
    "questions": ["Who met _ ?", "They ____ and _ .", "What did they do?"],
    "options": [["Bo", "no one"], ["sat", "left"], ["left", "sat"]],
    "answers": ["A", "B", "A"],
}


def article(path, **changes):
    return write(path, json.dumps({**ARTICLE, **changes}))


def test_an_option_fills_the_blank_or_follows_the_question(tmp_path):
    article(tmp_path / "1.txt")
    examples = read("race", tmp_path).examples
    assert [[question for question, _ in example.pairs] for example in examples] == [
        ["Who met Bo ?", "Who met no one ?"],
        ["They sat and sat .", "They left and left ."],
        ["What did they do? left", "What did they do? sat"],
    ]
    assert {text for example in examples for _, text in example.pairs} == {"Anna met Bo.\nThey left."}
    assert [example.label for example in examples] == [0, 1, 0]
    assert [example.id for example in examples] == ["high7.txt-0", "high7.txt-1", "high7.txt-2"]


def test_a_backslash_in_an_option_is_a_character(tmp_path):
    article(tmp_path / "1.txt", options=[["\\1", "b"]] * 3)
    assert read("race", tmp_path).examples[0].pairs[0][0] == "Who met \\1 ?"


def test_middle_and_high_are_groups(tmp_path):
    for level in ("middle", "high"):
        article(tmp_path / level / "1.txt", id=f"{level}1.txt")
    groups = [(example.group, example.id.partition("-")[0]) for example in read("race", tmp_path).examples]
    assert list(dict.fromkeys(groups)) == [("middle", "middle1.txt"), ("high", "high1.txt")]
    assert {example.group for example in read("race", tmp_path / "high").examples} == {""}
    both = read("race", tmp_path / "high", tmp_path / "middle").examples
    assert list(dict.fromkeys(example.group for example in both)) == ["high", "middle"]


def test_files_come_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 100):
        article(tmp_path / f"{number}.txt", id=f"m{number}")
    write(tmp_path / "._9.txt", "what a file manager left")
    names = [example.id for example in read("race", tmp_path).examples]
    assert names[::3] == ["m9-0", "m10-0", "m100-0"]


def test_a_part_without_answers_is_read_where_labels_are_not_needed(tmp_path):
    article(tmp_path / "1.txt", answers=None)
    assert {example.label for example in read("race", tmp_path, part="test").examples} == {None}
    assert refusal("race", tmp_path).startswith(f"{tmp_path / '1.txt'}: 'answers' must be a list of texts")


def test_empty_questions_and_options_are_kept_and_told(tmp_path):
    article(tmp_path / "1.txt", questions=["", "Why?", "How?"], options=[["a", "b"], ["", "c"], ["d", "e"]])
    reading = read("race", tmp_path)
    assert [example.pairs[0][0] for example in reading.examples] == ["a", "Why?", "How? d"]
    assert reading.notes == (f"{tmp_path}: 2 questions empty or with an empty option, kept as they are",)
    article(tmp_path / "1.txt", questions=["", "Why?", "How?"])
    assert read("race", tmp_path).notes == (
        f"{tmp_path}: 1 question empty or with an empty option, kept as it is",
    )


@pytest.mark.parametrize(("part", "count"), [("train", 1253), ("dev", 398)])
def test_all_questions_of_the_real_folders_are_read(part, count):
    folder = real_data(f"race_layout/{part}")
    values = [json.loads(path.read_text()) for path in folder.glob("*/*.txt")]
    letters = Counter(letter for value in values for letter in value["answers"])
    examples = read("race", folder).examples
    assert len(examples) == count
    assert Counter("ABC"[example.label] for example in examples) == letters
    assert {len(example.pairs) for example in examples} == {3}
    assert {example.group for example in examples} == {"middle"}
    right = {
        (value["id"], number): (value["options"][number]["ABC".index(letter)], value["article"])
        for value in values
        for number, letter in enumerate(value["answers"])
    }
    for example in examples:
        name, _, number = example.id.rpartition("-")
        option, text = right[name, int(number)]
        assert option in example.pairs[example.label][0]
        assert example.pairs[example.label][1] == text


BAD = [
    ({"answers": ["A", "C", "A"]}, ", question 1: the answer 'C' is none of the 2 options, which are A, B"),
    ({"answers": ["A", "AB", "A"]}, ", question 1: the answer 'AB' is none of the 2 options"),
    ({"answers": ["A", "", "A"]}, ", question 1: the answer '' is none of the 2 options"),
    ({"answers": ["A"]}, ": 1 answer beside 3 questions"),
    ({"options": [["a", "b"]]}, ": 'options' must have a list for each of 3 questions"),
    (
        {"options": [["a", "b"], ["a"], ["a", "b"]]},
        ", question 1: the options must be two texts or more, but they are ['a']",
    ),
    ({"options": [["a", "b"], ["a", 1], ["a", "b"]]}, ", question 1: the options must be two texts or more"),
    ({"article": " "}, ": 'article' must be a text, but it is ' '"),
    ({"id": None}, ": 'id' must be a text, but it is missing or null"),
    ({"questions": "Why?"}, ": 'questions' must be a list of texts, but it is 'Why?'"),
    ({"options": [["a", "b"], ["a", "b", "c"], ["a", "b"]]}, ", question 1: has 3 choices, but "),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[row[1][:50] for row in BAD])
def test_a_bad_article_is_refused_with_file_and_question(changes, message, tmp_path):
    path = article(tmp_path / "middle" / "3.txt", **changes)
    assert refusal("race", tmp_path).startswith(f"{path}{message}")


def test_files_with_other_numbers_of_options_are_both_named(tmp_path):
    article(tmp_path / "1.txt", id="a")
    article(tmp_path / "2.txt", id="b", options=[["a", "b", "c", "d"]] * 3)
    told = refusal("race", tmp_path)
    assert told.startswith(
        f"{tmp_path / '2.txt'}, question 0: has 4 choices, but {tmp_path / '1.txt'}, question 0 has 2"
    )


def test_an_article_that_is_there_twice_is_told(tmp_path):
    article(tmp_path / "1.txt")
    article(tmp_path / "2.txt")
    told = refusal("race", tmp_path)
    assert told.startswith(
        f"{tmp_path / '2.txt'}, question 0: the id 'high7.txt-0' is also that of {tmp_path / '1.txt'}"
    )


def test_broken_json_is_told_with_its_line(tmp_path):
    write(tmp_path / "1.txt", '{"id": "a",', '"article": }')
    assert refusal("race", tmp_path).startswith(f"{tmp_path / '1.txt'}:2: not JSON (Expecting value, column 12)")


def test_a_folder_without_articles_and_a_file_are_told(tmp_path):
    looked_for = "has no articles, which are looked for as *.txt in it or in its folders middle and high;"
    assert refusal("race", tmp_path).startswith(f"{tmp_path}: {looked_for}")
    (tmp_path / "parts" / "middle").mkdir(parents=True)
    assert refusal("race", tmp_path / "parts").startswith(f"{tmp_path / 'parts'}: {looked_for}")
    path = article(tmp_path / "1.txt")
    assert refusal("race", path).startswith(f"{path}: is a file; name the folder")


def test_several_folders_are_measured_one_by_one(tmp_path):
    folders = [tmp_path / name for name in ("dev", "test")]
    for folder in folders:
        for level in ("middle", "high"):
            (folder / level).mkdir(parents=True)
            content = {"id": f"{folder.name}-{level}1.txt", "article": "x", "questions": ["y"], "answers": ["A"]}
            content["options"] = [["a", "b"]]
            (folder / level / "1.txt").write_text(json.dumps(content))
    groups = [example.group for example in read("race", *folders, part="validation").examples]
    assert groups == ["dev_middle", "dev_high", "test_middle", "test_high"]
    assert [example.group for example in read("race", folders[0]).examples] == ["middle", "high"]
