"""Several files of a part: their groups, and ids that must not clash."""

import json

from tests.tasks.reading import read, refusal, task, write


def test_several_files_are_groups_whose_row_numbers_do_not_clash(tmp_path):
    paths = [write(tmp_path / name, "text,label", "t,x", "u,y") for name in ("dev_a.csv", "dev_b.csv")]
    assert [(example.group, example.id) for example in read("classification", *paths).examples] == [
        ("dev_a", "dev_a:0"),
        ("dev_a", "dev_a:1"),
        ("dev_b", "dev_b:0"),
        ("dev_b", "dev_b:1"),
    ]
    assert [(example.group, example.id) for example in read("classification", paths[0]).examples] == [
        ("", "0"),
        ("", "1"),
    ]


def test_files_of_the_same_name_are_told_apart_by_their_folders_or_suffix(tmp_path):
    paths = [write(tmp_path / name, "text,label", "t,x") for name in ("a/dev.csv", "b/dev.csv")]
    assert [example.group for example in read("classification", *paths).examples] == ["a_dev", "b_dev"]
    row = json.dumps({"text": "t", "label": "x"})
    paths = [paths[0], write(tmp_path / "a/dev.jsonl", row)]
    assert [example.group for example in read("classification", *paths).examples] == ["dev.csv", "dev.jsonl"]


def test_an_id_of_a_column_must_be_unique_over_all_files(tmp_path):
    known = task("classification", columns={"id": "key"})
    paths = [write(tmp_path / name, "key,text,label", "7,t,x") for name in ("a.csv", "b.csv")]
    told = refusal(known, *paths)
    assert told.startswith(f"{paths[1]}:2: the id '7' is also that of {paths[0]}:2;")


def test_a_file_that_is_given_twice_is_told(tmp_path):
    path = write(tmp_path / "a.csv", "text,label", "t,x")
    again = tmp_path / "sub" / ".." / "a.csv"
    (tmp_path / "sub").mkdir()
    assert refusal("classification", path, again) == f"{again} is the same file as {path}; give each file once"


def test_one_empty_file_of_two_is_told(tmp_path):
    paths = [write(tmp_path / "a.csv", "text,label", "t,x"), write(tmp_path / "b.csv", "text,label")]
    assert refusal("classification", *paths).startswith(f"{paths[1]}: has no example of the task")
