import json

import pytest

from megatron_bert_tp.data.preprocessing import lines, pieces
from megatron_bert_tp.data.preprocessing.documents import InputCounts, TextLayout, check_inputs, read_file
from megatron_bert_tp.data.preprocessing.pieces import Place
from megatron_bert_tp.errors import DataError


def pieces_of(path, start=None, counts=None, **layout):
    reads = read_file(path, TextLayout(**layout), start or Place(), counts or InputCounts())
    return [read.piece for read in reads if read.piece is not None]


def texts(path, **layout):
    pieces = pieces_of(path, **layout)
    assert all(piece.ends_document for piece in pieces)
    return [piece.text for piece in pieces]


def test_blank_lines_separate_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff\nOne.\r\nTwo.\r\n \r\n\r\nThree.\n\n".encode())
    documents = pieces_of(path)
    assert [document.text.split() for document in documents] == [["One.", "Two."], ["Three."]]
    assert documents[-1].next.offset == path.stat().st_size


def test_file_without_blank_lines_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("One.\nTwo.\nThree.")
    assert texts(tmp_path / "a.txt") == ["One.\nTwo.\nThree."]


def test_document_per_file_keeps_blank_lines_inside(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n")
    assert texts(tmp_path / "a.txt", document_per_file=True) == ["One.\n\nTwo.\n"]


def test_each_json_line_is_a_document(tmp_path):
    lines = [{"text": "One.\n\nTwo."}, {"text": " "}, {"text": "Three.", "other": 1}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    assert texts(tmp_path / "a.jsonl") == ["One.\n\nTwo.", "Three."]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"text": ', "line 2: not JSON"),
        ("[1]", "line 2: must be an object .* a list"),
        ('{"body": "x"}', r"line 2: .* the fields \['body'\]; name the field with --field"),
        ('{"text": 5}', "line 2: must be an object whose field 'text' is a string"),
    ],
)
def test_wrong_json_line_is_named(tmp_path, line, told):
    (tmp_path / "a.jsonl").write_text('{"text": "One."}\n' + line)
    with pytest.raises(DataError, match=told):
        texts(tmp_path / "a.jsonl")


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\nna\xefve\n")
    with pytest.raises(DataError, match=r"line 2: byte 3 \(0xef\) is not UTF-8"):
        texts(tmp_path / "a.txt")


@pytest.mark.parametrize(("name", "content"), [("a.txt", "\n \n\u3000\n"), ("a.jsonl", "\n \n"), ("a.txt", "")])
def test_file_without_text_is_counted(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    counts = InputCounts()
    assert pieces_of(tmp_path / name, counts=counts) == []
    assert counts == InputCounts(empty_files=1)


def test_all_unusable_inputs_are_named_at_once(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(DataError) as caught:
        check_inputs([tmp_path / "absent", tmp_path, tmp_path / "empty"])
    for told in ("absent: no such file", "is a directory"):
        assert told in str(caught.value)
    with pytest.raises(DataError, match="no input file holds a byte"):
        check_inputs([tmp_path / "empty"])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_all_line_ends_are_the_same(tmp_path, end):
    (tmp_path / "a.txt").write_bytes(end.join(["", "One.", "Two.", "", " ", "Three."]).encode())
    assert [text.strip() for text in texts(tmp_path / "a.txt")] == ["One.\nTwo.", "Three."]
    records = [json.dumps({"text": text}) for text in ("One.\r\nTwo.", "Three.")]
    (tmp_path / "a.jsonl").write_bytes(end.join(records).encode())
    assert texts(tmp_path / "a.jsonl") == ["One.\nTwo.", "Three."]


@pytest.mark.parametrize("document_per_file", [False, True])
@pytest.mark.parametrize("sentence", ["One two three.", "no end mark", "终于。"])
def test_reading_can_begin_at_every_place_that_it_gives(tmp_path, monkeypatch, document_per_file, sentence):
    monkeypatch.setattr(pieces, "PIECE", 60)
    monkeypatch.setattr(lines, "LONGEST_LINE", 100)
    blocks = ["\n".join([sentence] * (n % 9)) + " " + sentence * (n % 14) for n in range(40)]
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(blocks), encoding="utf-8")
    found = pieces_of(path, document_per_file=document_per_file)
    assert len(found) > 30
    assert "".join("".join(piece.text.split()) for piece in found) == "".join("".join(blocks).split())
    # The first block is blank.
    assert [piece.ends_document for piece in found].count(True) == (1 if document_per_file else 39)
    for number, piece in enumerate(found[:-1], start=1):
        assert pieces_of(path, piece.next, document_per_file=document_per_file) == found[number:]
