import json
import sys

import pytest

from megatron_bert_tp import preprocess as command
from megatron_bert_tp.config.command_line import run_command
from tests.data.corpus_reader import PACKERS, read_corpus

TEXTS = ["w5 w6. w7.", "w8\n\nw9! W10", "w11p150."]
EXPECTED = [[[5, 6, 1], [7, 1]], [[8], [9, 1], [10]], [[11, 150, 1]]]


@pytest.fixture
def corpus_of(tmp_path, vocabulary_file):
    """Function that runs the command on files and reads the corpus, or None where it failed."""

    def make(*arguments):
        rest = ["--tokenizer", vocabulary_file, "--output", tmp_path / "out", "--overwrite", "--workers", 1]
        given = [str(argument) for argument in (*arguments, *rest)]
        code = run_command(command.main, usage="", arguments=given)
        return read_corpus(tmp_path / "out") if code == 0 else None

    return make


@pytest.mark.parametrize("packed", PACKERS)
def test_every_packing_of_text_and_of_json_lines_is_read(tmp_path, corpus_of, packed):
    texts = {
        "a.jsonl": "\n".join(json.dumps({"body": text}) for text in TEXTS),
        "a.TXT": "\n\n".join(text.replace("\n\n", "\n") for text in TEXTS),
    }
    for name, text in texts.items():
        path = tmp_path / f"{name}{packed}"
        path.write_bytes(PACKERS[packed](text.encode()))
        found = corpus_of(path, "--field", "body")
        assert found == (EXPECTED if name == "a.jsonl" else [EXPECTED[0], [[8, 9, 1], [10]], EXPECTED[2]])


@pytest.mark.parametrize("packed", [".gz", ".xz", ".zst"])
def test_parts_that_were_packed_one_by_one_are_one_file(tmp_path, corpus_of, packed):
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(b"".join(PACKERS[packed](text) for text in (b"w5 ", b"w6.\n\nw", b"7.\n")))
    assert corpus_of(path) == [[[5, 6, 1]], [[7, 1]]]


@pytest.mark.parametrize("packed", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut short", "cut at its end", "bytes changed", "something else"])
def test_damaged_compressed_files_are_named_with_a_way_out(tmp_path, corpus_of, capsys, packed, damage):
    content = PACKERS[packed](b"".join(b"w%d w%d.\n\n" % (n % 97 + 5, n * 31 % 89) for n in range(20_000)))
    middle = len(content) // 2
    damaged = {
        "cut short": content[:middle],
        "cut at its end": content[:-1],
        "bytes changed": content[:middle] + bytes(64) + content[middle + 64 :],
        "something else": b"plain text",
    }[damage]
    if packed == ".zst" and damage == "bytes changed":
        pytest.skip("a frame without checksum says nothing of changed literals")
    (tmp_path / f"a.txt{packed}").write_bytes(damaged)
    assert corpus_of(tmp_path / f"a.txt{packed}") is None
    told = capsys.readouterr().err
    assert f"a.txt{packed}: the compressed data is damaged or cut short" in told
    assert "fetch the file again" in told
    assert "Traceback" not in told
    assert not (tmp_path / "out.bin").exists()


def test_parquet_is_read_by_row_groups(tmp_path, corpus_of):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"n": range(5), "body": [*TEXTS[:2], None, TEXTS[2], " "]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2, compression="zstd")
    assert corpus_of(tmp_path / "a.parquet", "--field", "body") == EXPECTED
    assert json.loads((tmp_path / "out.json").read_text())["report"]["dropped"]["records_without_text"] == 2


@pytest.mark.parametrize(
    ("field", "told"),
    [("text", "has no column 'text' but ['n', 'body']; name it with --field"), ("n", "'n' holds int64, not text")],
)
def test_parquet_without_the_column_is_refused(tmp_path, corpus_of, capsys, field, told):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"n": [1], "body": ["w5"]}), tmp_path / "a.parquet")
    assert corpus_of(tmp_path / "a.parquet", "--field", field) is None
    assert told in capsys.readouterr().err


def test_damaged_parquet_and_parquet_without_pyarrow_are_told(tmp_path, corpus_of, capsys, monkeypatch):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    assert corpus_of(tmp_path / "a.parquet") is None
    assert "a.parquet: the Parquet data is damaged or cut short" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # what Python does where a package is not installed
    assert corpus_of(tmp_path / "a.parquet") is None
    assert "pip install 'megatron-bert-tp[parquet]'" in capsys.readouterr().err


def test_a_file_under_a_wrong_name_is_recognised(tmp_path, corpus_of, capsys):
    (tmp_path / "a.txt").write_bytes(PACKERS[".gz"](b"w5"))
    assert corpus_of(tmp_path / "a.txt") is None
    told = capsys.readouterr().err
    assert "line 1: byte 2 (0x8b) is not UTF-8; the file is gzip data: rename it to end in .gz" in told
    (tmp_path / "b.txt").write_bytes("w5 w6".encode("utf-16"))
    assert corpus_of(tmp_path / "b.txt") is None
    assert "UTF-16: convert it with `iconv" in capsys.readouterr().err
