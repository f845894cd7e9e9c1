"""Bytes that are no text, lines that are too long, and files that are not there."""

import subprocess
import sys

import pytest

from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks.reading.lines import LONGEST_LINE, read_lines
from tests.sources import ROOT
from tests.tasks.reading import read, refusal, write

HEADER = b"sentence\tlabel\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + b"good\t1\ncaf\xe9 .\t0\n", ":3: byte 3 of the line (0xe9) is not UTF-8"),
        (HEADER + b"a\x00b\t1\n", ":2: byte 1 of the line is NUL, which no text has"),
        ("sentence\tlabel\n".encode("utf-16-le"), ":1: byte 1 of the line is NUL"),
        (HEADER + b"x" * (LONGEST_LINE + 1) + b"\n", f":2: the line has more than {LONGEST_LINE} bytes"),
    ],
)
def test_what_is_no_text_is_refused_with_its_line(content, message, tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_bytes(content)
    assert refusal("sst-2", path).startswith(f"{path}{message}")


def test_the_longest_line_is_read_with_either_end(tmp_path):
    for end in (b"\n", b"\r\n", b""):
        path = tmp_path / "long.txt"
        path.write_bytes(b"x" * LONGEST_LINE + end)
        assert [(n, len(text)) for n, text in read_lines(path)] == [(1, LONGEST_LINE)]


def test_only_line_feeds_end_lines(tmp_path):
    # Python's splitlines() also cuts at these, and a universal newline at the lone CR.
    odd = "one\x0btwo\x0cthree\x1cfour\x85five\u2028six\rseven"
    path = write(tmp_path / "dev.tsv", "sentence\tlabel", f"{odd}\t1", end="\r\n")
    (example,) = read("sst-2", path).examples
    assert example.text == odd


def test_a_byte_order_mark_is_dropped_at_the_beginning_alone(tmp_path):
    path = write(tmp_path / "dev.tsv", "\ufeffsentence\tlabel", "\ufeffone\t1")
    assert [example.text for example in read("sst-2", path).examples] == ["\ufeffone"]


def test_the_place_of_a_bad_byte_in_json_counts_lines(tmp_path):
    path = tmp_path / "dev.json"
    path.write_bytes(b'{"data":\n[\n  "\xff"]}')
    assert refusal("squad", path).startswith(f"{path}:3: byte 3 of the line (0xff) is not UTF-8")


def test_a_file_that_is_not_there_is_told(tmp_path):
    assert refusal("rte", tmp_path / "no.tsv") == f"{tmp_path / 'no.tsv'}: no such file or folder; check the path"


def test_no_path_at_all_is_told():
    with pytest.raises(DataError, match="no file is given"):
        read("rte")


def test_reading_does_not_import_torch():
    code = "import sys, megatron_bert_tp.tasks.reading.read; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
