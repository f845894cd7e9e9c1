import json
import sys
import tracemalloc

import pytest

from megatron_bert_tp.data.preprocessing.compressed import open_stream
from tests.data.corpus_reader import PACKERS

TEXTS = ["w5 w6. w7.", "w8\n\nw9! W10", "w11p150."]
EXPECTED = [[[5, 6, 1], [7, 1]], [[8], [9, 1], [10]], [[11, 150, 1]]]


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


def test_padding_between_the_parts_of_an_xz_file_ends_no_text(tmp_path, corpus_of):
    parts = [PACKERS[".xz"](text) for text in (b"w5 ", b"w6.\n\nw", b"7.\n")]
    path = tmp_path / "a.txt.xz"
    path.write_bytes(bytes(8).join(parts) + bytes(9000))  # the format allows multiples of four
    assert corpus_of(path) == [[[5, 6, 1]], [[7, 1]]]
    path.write_bytes(bytes(8) + parts[0])
    assert corpus_of(path) is None


@pytest.mark.parametrize("packed", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["changed", "no part", "cut short"])
def test_damage_in_a_later_part_is_no_end_of_the_text(tmp_path, corpus_of, capsys, packed, damage):
    first, second = PACKERS[packed](b"w5. w6.\n\n"), bytearray(PACKERS[packed](b"w7 w8 w9. w10.\n"))
    if damage == "changed":
        second[2] ^= 0xFF
    wrong = {"changed": bytes(second), "no part": b"garbage", "cut short": second[:5]}[damage]
    (tmp_path / f"a.txt{packed}").write_bytes(first + wrong)
    assert corpus_of(tmp_path / f"a.txt{packed}") is None
    assert "the compressed data is damaged or cut short" in capsys.readouterr().err


@pytest.mark.parametrize("packed", [".xz", ".zst"])
def test_text_that_packs_ten_thousand_times_smaller_does_not_fill_memory(tmp_path, packed):
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(PACKERS[packed](b"w5 w6.\n" * 60_000_000))
    tracemalloc.start()
    try:
        with open_stream(path) as stream:
            assert sum(map(len, iter(lambda: stream.unpacked.read(1 << 18), b""))) == 420_000_000
        assert tracemalloc.get_traced_memory()[1] < 200_000_000
    finally:
        tracemalloc.stop()


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


def test_parquet_of_bytes_is_read_and_an_invalid_row_has_its_number(tmp_path, corpus_of, capsys):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for kind in (arrow.string(), arrow.large_string(), arrow.binary(), arrow.large_binary()):
        parquet.write_table(arrow.table({"text": arrow.array(TEXTS, kind)}), tmp_path / "a.parquet")
        assert corpus_of(tmp_path / "a.parquet") == EXPECTED
    rows = arrow.array([b"w5", b"w6\nw7\n\xff"], arrow.binary())
    parquet.write_table(arrow.table({"text": rows}), tmp_path / "a.parquet")
    assert corpus_of(tmp_path / "a.parquet") is None
    assert "a.parquet, row 2: byte 1 (0xff) is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"text": null}', "is a string, but it is null there"),
        ('{"text": {"a": 1}}', 'is a string, but it is {"a": 1} there'),
        ('{"body": "w5"}', "is a string, but it has the fields ['body']"),
        ('["w5"]', "is a string, but it is a list"),
    ],
)
def test_a_json_line_without_the_text_says_what_it_has(tmp_path, corpus_of, capsys, line, told):
    (tmp_path / "a.jsonl").write_text(line)
    assert corpus_of(tmp_path / "a.jsonl") is None
    assert f"a.jsonl, line 1: must be an object whose field 'text' {told}" in capsys.readouterr().err
