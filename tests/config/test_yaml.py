"""The traps of YAML are closed."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bert_tp.config.load import load_config
from megatron_bert_tp.config.reader import LARGEST_FILE, plain_scalar, read_file
from megatron_bert_tp.errors import ConfigError

Write = Callable[[str], Path]


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E4", 1e4),
        ("2e-3", 2e-3),
        (".5", 0.5),
        ("5.", 5.0),
        ("-1.5e+3", -1500.0),
        ("+7", 7),
        ("0", 0),
        ("-0", 0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: object):
    assert plain_scalar(text) == value
    assert type(plain_scalar(text)) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "yes",
        "no",
        "on",
        "off",
        "Yes",
        "NO",
        "y",
        "n",
        "010",
        "0o10",
        "0x10",
        "0b1",
        "1_000",
        "1:30",
        "190:20:30",
        "2026-11-22",
        "1e",
        "1e+",
        ".",
        "e5",
        "tRUE",
        "inf",
        "nan",
        "1,000",
        "=",
        "<<",
    ],
)
def test_other_plain_scalars_stay_text(text: str):
    assert plain_scalar(text) == text


def test_infinity_and_nan_are_numbers_that_the_settings_refuse():
    assert plain_scalar(".inf") == math.inf
    assert math.isnan(plain_scalar(".nan"))


def test_quotes_make_text(write: Write):
    entry = read_file(write("a: '1'")).entries[0]
    assert entry.value == "1"


def test_repeated_key_is_told_with_both_lines(write: Write):
    message = refusal(write("run:\n  seed: 1\n  log_every: 5\n  keep_last: 1\n  log_every: 7\n"))
    assert "run.log_every  (" in message
    assert "settings.yaml:5)\n      is given twice, first in " in message
    assert "settings.yaml:3\n" in message


def test_repeated_section_is_told_and_its_settings_are_checked(write: Write):
    message = refusal(write("run: {log_every: 1}\nrun: {keep_last: 0}\n"))
    assert "is given twice" in message
    assert "run.keep_last = 0" in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("---\n", "must hold sections"),
        ("model\n", "must hold sections"),
        ("- model\n- data\n", "must hold sections"),
        ("model:\n\tvocab_size: 3\n", "settings.yaml:2, column 1: "),
        ("model: {vocab_size: 3\n", "settings.yaml:2, column 1: "),
        ("model:\n  a: 1\n b: 2\n", "settings.yaml:3, column 2: "),
        ("model: a: b\n", "settings.yaml:1, column 9: "),
        ("a: 1\n---\nb: 2\n", "settings.yaml:2, column 1: "),
        ("a: &x 1\n", "settings.yaml:1, column 4: anchors (&)"),
        ("a: 1\nb: *x\n", "settings.yaml:2, column 4: anchors (&)"),
        ("a: &a [1]\nb: [*a, *a, *a]\n", "anchors (&)"),
        ("<<: &x {a: 1}\n", "anchors (&)"),
        ("a: !!python/object/apply:os.system ['true']\n", "settings.yaml:1, column 4: tags (!)"),
        ("a: !!int '3'\n", "tags (!)"),
        ("a: " + "[" * 5000 + "]" * 5000 + "\n", "levels"),
        ("a: " + "[" * 50 + "]" * 50 + "\n", "levels"),
        ("a: [" + "0, " * 20000 + "0]\n", "levels"),
        ("? [a, b]\n: 1\n", "settings.yaml:1: the name of a setting must be a word"),
        ("a: 1\nb: \x07\n", "settings.yaml:2 holds the unprintable character"),
        ("#" * (LARGEST_FILE + 1), "is larger than 1,000,000 bytes"),
    ],
    ids=lambda text: repr(text)[:30],
)
def test_file_that_is_no_strict_yaml_is_refused_with_its_place(write: Write, text: str, part: str):
    message = refusal(write(text))
    assert part in message
    assert "settings.yaml" in message


def test_file_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path):
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"model:\n  weights: caf\xe9\n")
    assert "latin.yaml:2 is not UTF-8" in refusal(path)


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path):
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel:\r\n  vocab_size: 3\r\n")
    (section,) = read_file(path).entries
    assert section.name == "model"


def test_missing_file_lists_the_yaml_files_near_it(tmp_path: Path):
    (tmp_path / "demo.yaml").touch()
    (tmp_path / "notes.txt").touch()
    message = refusal(tmp_path / "dmeo.yaml")
    assert f"no settings file {tmp_path / 'dmeo.yaml'}" in message
    assert str(tmp_path / "demo.yaml") in message
    assert "notes.txt" not in message


def test_folder_in_place_of_a_file_lists_what_it_holds(tmp_path: Path):
    (tmp_path / "demo.yml").touch()
    message = refusal(tmp_path)
    assert "is not a file" in message
    assert "demo.yml" in message


def test_path_too_long_for_the_system_is_a_config_error():
    assert "cannot be read" in refusal(Path("a" * 5000))


def test_value_under_the_name_of_a_section_is_told(write: Write):
    message = refusal(write("model: large\nobjective:\n  masking: 0.15\n"))
    assert "model = 'large'" in message
    assert "objective.masking = 0.15" in message
    assert message.count("is a section") == 2


def test_section_may_be_empty(write: Write):
    assert "is a section" not in refusal(write("objective:\nmodel: {}\n"))


def test_dotted_name_in_the_file_is_told_where_to_go(write: Write):
    message = refusal(write("model.vocab_size: 3\n"))
    assert "write `vocab_size:` indented under `model:`" in message
