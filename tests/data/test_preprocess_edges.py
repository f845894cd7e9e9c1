"""Odd inputs through the command: what comes out is what docs/preprocess.md says."""

import json
import resource
import subprocess
import sys

import pytest
from tokenizers.implementations import BertWordPieceTokenizer

from megatron_bert_tp.data.preprocessing.preprocess import preprocess
from megatron_bert_tp.errors import DataError
from tests.data.corpus_reader import read_corpus


def report_of(tmp_path):
    return json.loads((tmp_path / "out.json").read_text())["report"]


def test_documents_of_one_sentence_work_and_the_report_names_the_setting(tmp_path, corpus_of, capsys):
    (tmp_path / "a.txt").write_text("w5 w6.\n\nw7.\n\nw8.")
    assert corpus_of(tmp_path / "a.txt") == [[[5, 6, 1]], [[7, 1]], [[8, 1]]]
    assert "objective.pairs=none" in capsys.readouterr().out
    assert report_of(tmp_path)["single_sentence_documents"] == 3
    (tmp_path / "a.txt").write_text("w5. w6.\n\nw7. w8.")
    corpus_of(tmp_path / "a.txt")
    assert "objective.pairs" not in capsys.readouterr().out
    (tmp_path / "a.txt").write_text("w5. w6.\n\nw7.")
    corpus_of(tmp_path / "a.txt")
    assert "here there are 1: see how documents are separated, or train with objective.pairs=sop or none" in (
        capsys.readouterr().out
    )
    (tmp_path / "a.txt").write_text("w5. w6.\n\nw7. w8.\n\nw9.")
    corpus_of(tmp_path / "a.txt")
    told = capsys.readouterr().out
    assert "1 of 3 documents have one sentence" in told
    assert "of one sentence   1 (33%)" in told


@pytest.mark.parametrize("ending", [".bin", ".idx", ".json"])
def test_output_with_the_ending_of_a_file_or_of_a_folder_is_refused(tmp_path, vocabulary_file, ending):
    (tmp_path / "a.txt").write_text("w5.")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"give it without, as .*/out$"):
        preprocess([tmp_path / "a.txt"], vocabulary_file, tmp_path / f"out{ending}")
    with pytest.raises(DataError, match=r"is a folder.*such as .*/folder/corpus"):
        preprocess([tmp_path / "a.txt"], vocabulary_file, tmp_path / "folder")


def test_a_cased_vocabulary_for_lowercased_text_is_noted(tmp_path, vocabulary_file, capsys):
    (tmp_path / "a.txt").write_text("w5.")
    entries = vocabulary_file.read_text()
    for name, more, is_noted in (("cased", "Word\n##ING\n", True), ("uncased", "[unused1]\n", False)):
        (tmp_path / "vocab.txt").write_text(entries + more)
        preprocess([tmp_path / "a.txt"], tmp_path / "vocab.txt", tmp_path / name)
        assert ("2 entries with upper-case letters" in capsys.readouterr().err) == is_noted


def test_empty_files_among_others_are_counted(tmp_path, corpus_of, capsys):
    for name, text in {"a.txt": "", "b.txt": "w5.", "c.jsonl": "", "d.txt": "\n\n"}.items():
        (tmp_path / name).write_text(text)
    assert corpus_of(*(tmp_path / name for name in ("a.txt", "b.txt", "c.jsonl", "d.txt"))) == [[[5, 1]]]
    assert report_of(tmp_path)["dropped"]["files_without_text"] == 3
    assert "3 files without text" in capsys.readouterr().out


# The peak of the kernel's usage report would be that of this process, which a child inherits.
WITH_PEAK = """
import sys
from pathlib import Path
from megatron_bert_tp.preprocess import main
main(sys.argv[1:])
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


def processor_seconds_of_children() -> float:
    """Of those that have ended; unlike the time of day, it does not grow with the load of the machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("character", ["a", "中", "x.", "\0", "« "])
def test_a_line_of_5_mb_takes_seconds_and_flat_memory(tmp_path, vocabulary_file, character):
    (tmp_path / "a.txt").write_text(character * (5_000_000 // len(character.encode())) + "\n\nw5.")
    rest = ["--workers", "1", "--tokenizer", vocabulary_file, "--output", tmp_path / "out"]
    arguments = [tmp_path / "a.txt", *rest]
    limited = ["bash", "-c", 'ulimit -v 4000000; exec "$@"', "bash", sys.executable, "-c", WITH_PEAK, *arguments]
    before = processor_seconds_of_children()
    told = subprocess.run([str(word) for word in limited], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert processor_seconds_of_children() - before < 60
    found = read_corpus(tmp_path / "out")
    assert found[-1] == [[5, 1]]
    expected = {"a": 1, "中": 5_000_000 // 3, "x.": 5_000_000, "\0": 0, "« ": 5_000_000 // 3}[character]
    tokens = [token for document in found[:-1] for sentence in document for token in sentence]
    assert (len(tokens), set(tokens)) == (expected, {1} if expected else set())
    assert int(told.split()[-2]) < 900_000  # kB


def test_invalid_utf8_is_refused_replaced_or_dropped(tmp_path, corpus_of, capsys):
    (tmp_path / "a.txt").write_bytes(b"w5\nw6 \xff w7\nw8\n\nw9\xe4\xb8")
    assert corpus_of(tmp_path / "a.txt") is None
    told = capsys.readouterr().err
    assert "a.txt, line 2: byte 4 (0xff) is not UTF-8" in told
    assert "--invalid-utf8 replace or --invalid-utf8 drop-line" in told
    assert corpus_of(tmp_path / "a.txt", "--invalid-utf8", "replace") == [[[5, 6, 7, 8]], [[9]]]
    assert report_of(tmp_path)["mended_lines"] == 2
    assert corpus_of(tmp_path / "a.txt", "--invalid-utf8", "drop-line") == [[[5, 8]]]
    assert report_of(tmp_path)["dropped"]["lines_that_are_not_utf8"] == 2


def test_half_a_surrogate_pair_in_json_is_invalid_text(tmp_path, corpus_of, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "w5"}\n{"text": "w6 \\ud83d w7"}')
    assert corpus_of(tmp_path / "a.jsonl") is None
    assert "a.jsonl, line 2: the escape \\ud83d is half of a surrogate pair" in capsys.readouterr().err
    assert corpus_of(tmp_path / "a.jsonl", "--invalid-utf8", "replace") == [[[5]], [[6, 7]]]
    assert corpus_of(tmp_path / "a.jsonl", "--invalid-utf8", "drop-line") == [[[5]]]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"w5\0w6 \0w7\n\0\n\nw8", [[[1, 7]], [[8]]]),  # NUL is dropped, and joins what it stood between
        (b"w5.\r\nw6.\r\n\r\nw7", [[[5, 1], [6, 1]], [[7]]]),
        (b"w5.\rw6.\r\rw7", [[[5, 1], [6, 1]], [[7]]]),
        (b"\xef\xbb\xbfw5\n\n\xef\xbb\xbfw6\n\xef\xbb\xbf\nw7", [[[5]], [[6]], [[7]]]),
        ("w5\u2028w6\u2029w7\u0085w8".encode(), [[[5, 6, 7, 8]]]),
        (b"w5\x0bw6\x0cw7\x1cw8\x1fw9", [[[5, 6, 7, 8, 9]]]),
        ("w5\u200bw6 w7\ufe0f".encode(), [[[1, 7]]]),
    ],
)
def test_odd_characters_do_what_a_reader_expects(tmp_path, corpus_of, content, expected):
    (tmp_path / "a.txt").write_bytes(content)
    assert corpus_of(tmp_path / "a.txt") == expected


def test_byte_order_marks_in_joined_json_lines_are_dropped(tmp_path, corpus_of):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "w5"}\n' * 2)
    assert corpus_of(tmp_path / "a.jsonl") == [[[5]], [[5]]]


def test_scripts_and_emoji_become_what_the_library_alone_makes_of_them(tmp_path, shared_file):
    vocabulary = shared_file("vocab/bert-large-uncased-vocab.txt")
    sentences = ["مرحبا بكم في القاهرة", "שלום עולם", "A 👩‍👩‍👧‍👦 and 👍🏽 ❤️"]
    sentences += ["naïve Ǆ ŉ ﬁ ß İ", "한국어 텍스트", "日本語"]
    (tmp_path / "a.txt").write_text("\n".join(sentences))
    command = [sys.executable, "-m", "megatron_bert_tp.preprocess", tmp_path / "a.txt", "--sentences-per-line"]
    rest = ["--tokenizer", vocabulary, "--output", tmp_path / "out"]
    subprocess.run([str(word) for word in (*command, *rest)], check=True)
    library = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    expected = [encoding.ids for encoding in library.encode_batch(sentences, add_special_tokens=False)]
    assert read_corpus(tmp_path / "out") == [expected]
