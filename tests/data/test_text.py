import json

import pytest

from megatron_bert_tp.data.text import TextLayout, check_inputs, read_documents, split_sentences
from megatron_bert_tp.errors import DataError


def texts(path, **layout):
    return [document.text for document in read_documents(path, TextLayout(**layout))]


def test_blank_lines_separate_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff\nOne.\r\nTwo.\r\n \r\n\r\nThree.\n\n".encode())
    documents = list(read_documents(path, TextLayout()))
    assert [document.text.split() for document in documents] == [["One.", "Two."], ["Three."]]
    assert path.stat().st_size - sum(document.num_bytes for document in documents) == 0


def test_file_without_blank_lines_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("One.\nTwo.\nThree.")
    assert texts(tmp_path / "a.txt") == ["One.\nTwo.\nThree."]


def test_document_per_file_keeps_blank_lines_inside(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n")
    assert texts(tmp_path / "a.txt", document_per_file=True) == ["One.\n\nTwo."]


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
    with pytest.raises(DataError, match=r"line 2: byte 2 \(0xef\) is not UTF-8"):
        texts(tmp_path / "a.txt")


def test_file_of_blank_lines_holds_no_text(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text("\n \n")
        with pytest.raises(DataError, match=f"{name}: holds no text"):
            texts(tmp_path / name)


def test_all_unusable_inputs_are_named_at_once(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(DataError) as caught:
        check_inputs([tmp_path / "absent", tmp_path, tmp_path / "empty"])
    for told in ("absent: no such file", "is a directory", "empty: is empty"):
        assert told in str(caught.value)


def test_sentences_end_at_their_mark_and_at_blank_lines_but_not_after_titles():
    text = "A heading\n\nMr. Smith lives in\nthe U.S. today. He is \n 5.5 feet tall! Is he?"
    expected = ["A heading", "Mr. Smith lives in the U.S. today.", "He is 5.5 feet tall!", "Is he?"]
    assert [s.strip() for s in split_sentences(text, sentence_per_line=False)] == expected


def test_with_a_sentence_per_line_nothing_is_split_or_joined():
    assert split_sentences("One. Two.\nThree\n\n \nfour", sentence_per_line=True) == ["One. Two.", "Three", "four"]
