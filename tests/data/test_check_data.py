import hashlib
import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_bert_tp.check_data import main
from megatron_bert_tp.data.corpus import scan
from megatron_bert_tp.errors import DataError
from tests.data.corpora import SPECIAL
from tests.data.index_files import index_bytes, write_files

PAD, UNKNOWN, CLS, SEP, MASK = range(5)
CORPUS = [[[5, 6, 7], [8]], [[9, 10]], [], [[11, 1], [13], [14, 15, 16, 199]]]


def check(capsys, *arguments):
    """Exit code, what was printed, and what was told on stderr."""
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def report_of(capsys, *arguments):
    """Exit code and the one object of the JSON report."""
    code, out, _ = check(capsys, *arguments, "--json")
    (report,) = json.loads(out)
    return code, report


def random_documents(seed):
    """Documents of 0 to 5 sentences, a few of them longer than 512 tokens."""
    draws = np.random.default_rng(seed)
    return [
        [draws.integers(1, 200, size=draws.choice([3, 40, 512, 513, 600])).tolist() for _ in range(sentences)]
        for sentences in draws.integers(0, 6, size=80)
    ]


@pytest.mark.parametrize("block", [1, 13, 1 << 20])
@pytest.mark.parametrize("letter", ["H", "i", "q"])
def test_every_number_of_the_report_is_that_of_a_count_by_hand(
    tmp_path, capsys, monkeypatch, vocabulary_file, letter, block
):
    monkeypatch.setattr(scan, "_BLOCK", 100 * block)
    monkeypatch.setattr(scan, "_INDEX_BLOCK", block)
    documents = random_documents(1)
    write_files(tmp_path / "corpus", documents, letter=letter)
    _, found = report_of(capsys, tmp_path / "corpus", "--tokenizer", vocabulary_file)
    lengths = [[len(sentence) for sentence in document] for document in documents]
    ids = Counter(token for document in documents for sentence in document for token in sentence)
    flat = [length for document in lengths for length in document]
    assert (found["documents"], found["sentences"], found["tokens"]) == (80, len(flat), sum(flat))
    assert found["empty_documents"] == lengths.count([])
    assert found["documents_of_one_sentence"] == sum(len(document) == 1 for document in lengths)
    assert found["long_sentences"] == sum(length > 512 for length in flat)
    assert found["longest_sentence"] == max(flat)
    assert (found["smallest_id"], found["largest_id"]) == (min(ids), max(ids))
    assert found["special_tokens"] == {name: ids[number] for number, name in enumerate(SPECIAL)}
    for name, least in (("nsp", 2), ("sop", 2), ("none", 1)):
        usable = [document for document in lengths if len(document) >= least]
        totals = (len(usable), sum(map(len, usable)), sum(map(sum, usable)))
        assert tuple(found["usable"][name].values()) == totals
    rows = found["tokens_per_document"]
    assert [count for *_, count in rows] == [
        sum(fewest <= sum(document) <= most for document in lengths) for fewest, most, _ in rows
    ]
    assert sum(count for *_, count in rows) == 80


def test_a_sound_corpus_is_reported_with_exit_code_0(tmp_path, capsys, write_corpus, vocabulary_file):
    write_corpus([document for document in CORPUS if document])
    code, out, err = check(capsys, tmp_path / "corpus", "--tokenizer", vocabulary_file)
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == f"{tmp_path / 'corpus'}: no damage found"
    for line in (
        "documents 3",
        "of one sentence 1",
        "sentences 6 of 2.2 tokens, the longest of 4",
        "usable for nsp 2 documents, 5 sentences, 11 tokens",
        "usable for none 3 documents, 6 sentences, 13 tokens",
        "ids 1 to 199, vocabulary of 200 entries",
        "[UNK] 1 (7.692%)",
        "4-7 2 ########################################",
        "2-3 1 ####################",
    ):
        assert line in lines


def test_values_stand_in_one_column(tmp_path, capsys, write_corpus):
    write_corpus([document for document in CORPUS if document])
    _, out, _ = check(capsys, tmp_path / "corpus")
    rows = out.splitlines()[1 : out.splitlines().index("  tokens of a document")]
    assert len({len(row) - len(row.lstrip()[len(row.lstrip().split("  ")[0]) :].lstrip()) for row in rows}) == 1


def test_without_pairs_of_sentences_next_sentence_prediction_can_use_nothing(tmp_path, capsys):
    for name, documents in (("ones", [[[5]], [[6, 7]]]), ("lone", [[[5], [6]], [[7]]])):
        write_files(tmp_path / name, documents)
        code, found = report_of(capsys, tmp_path / name)
        assert code == 0
        assert found["usable"]["nsp"] == {"documents": 0, "sentences": 0, "tokens": 0}
        assert found["usable"]["none"]["documents"] == 2
    assert found["usable"]["sop"]["documents"] == 1


def test_every_altered_byte_of_the_tokens_is_found_by_the_hash(tmp_path, capsys, write_corpus):
    write_corpus([document for document in CORPUS if document])
    path = tmp_path / "corpus.bin"
    content = path.read_bytes()
    for offset in range(len(content)):
        path.write_bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :])
        code, _, err = check(capsys, tmp_path / "corpus")
        assert code == 1
        assert f"{path}: the .json says that its SHA-256 is " in err
    path.write_bytes(content)
    assert check(capsys, tmp_path / "corpus")[0] == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"bin_sha256": "0" * 64}, [f"SHA-256 is {'0' * 64}, but it is "]),
        ({"largest_id": 198}, ["the largest id is 198, but it is 199"]),
        ({"vocab_size": 199}, ["must lie in 0..198, but 1 of 13 do not", "sentence 5 of document 2: 199"]),
        ({"sentences": 7}, ["(3, 7, 13)", "(3, 6, 13)"]),
    ],
)
def test_facts_that_do_not_hold_are_told(tmp_path, capsys, write_corpus, changes, told):
    write_corpus([document for document in CORPUS if document])
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    code, _, err = check(capsys, tmp_path / "corpus")
    assert code == 1
    assert err.startswith("error: ")
    assert [part for part in told if part not in err] == []


def test_another_tokenizer_is_told(tmp_path, capsys, write_corpus, vocabulary_file):
    write_corpus([document for document in CORPUS if document])
    other = tmp_path / "vocab.txt"
    other.write_text(vocabulary_file.read_text() + "more\n")
    code, _, err = check(capsys, tmp_path / "corpus", "--tokenizer", other)
    assert (code, err.count("error: ")) == (1, 1)
    assert "made with the tokenizer" in err
    code, _, err = check(capsys, tmp_path / "corpus", "--tokenizer", vocabulary_file, "--cased")
    assert code == 1
    assert "lowercase False" in err


@pytest.mark.parametrize("block", [1, 15, 1 << 20])
@pytest.mark.parametrize("number", [PAD, CLS, SEP, MASK])
def test_special_tokens_inside_the_text_are_told_with_the_first_place(
    tmp_path, capsys, monkeypatch, vocabulary_file, number, block
):
    monkeypatch.setattr(scan, "_BLOCK", block)
    write_files(tmp_path / "corpus", [*CORPUS, [[5, 6], [7, number, number, 8]]])
    code, _, err = check(capsys, tmp_path / "corpus", "--tokenizer", vocabulary_file)
    assert (code, err.count("error: ")) == (1, 1)
    assert f"{SPECIAL[number]} is added to samples later, but it stands there 2 times" in err
    assert "the first in sentence 7 of document 4" in err


@pytest.mark.parametrize("block", [1, 15, 1 << 20])
def test_ids_outside_are_told_with_the_first_place(tmp_path, capsys, monkeypatch, vocabulary_file, block):
    monkeypatch.setattr(scan, "_BLOCK", block)
    write_files(tmp_path / "corpus", [*CORPUS, [[5, -6], [200, 7]]], letter="i")
    code, _, err = check(capsys, tmp_path / "corpus", "--tokenizer", vocabulary_file)
    assert code == 1
    assert "must lie in 0..199, but 2 of 17 do not, the first in sentence 6 of document 4: -6" in err
    code, out, err = check(capsys, tmp_path / "corpus")
    assert code == 1
    assert "must not be negative, but 1 of 17 do not" in err
    assert "vocabulary unknown: give --tokenizer" in out


def test_all_corpora_are_checked_and_each_problem_is_told(tmp_path, capsys, vocabulary_file):
    write_files(tmp_path / "good", CORPUS)
    write_files(tmp_path / "special", [*CORPUS, [[SEP, CLS]]])
    write_files(tmp_path / "cut", CORPUS)
    (tmp_path / "cut.bin").write_bytes(b"1234")
    names = ["special", "missing", "good", "cut"]
    arguments = [*(tmp_path / name for name in names), "--tokenizer", vocabulary_file]
    code, out, err = check(capsys, *arguments)
    assert code == 1
    assert [line.split(": ")[1] for line in out.splitlines() if ": " in line and str(tmp_path) in line] == [
        "problems",
        "no damage found",
    ]
    told = err.splitlines()
    assert [line.startswith("error: ") for line in told] == [True] * 4
    assert "[CLS] is added" in told[0]
    assert "missing.bin: no such file" in told[2]
    assert "expects 26 bytes, the file has 4" in told[3]
    code, out, _ = check(capsys, *arguments, "--json")
    assert code == 1
    found = [(Path(report["prefix"]).name, len(report["problems"])) for report in json.loads(out)]
    assert found == [("special", 2), ("missing", 1), ("good", 0), ("cut", 1)]


def test_command_line_has_the_exit_codes_0_to_3(tmp_path):
    write_files(tmp_path / "good", CORPUS)
    command = [sys.executable, "-m", "megatron_bert_tp.check_data"]
    for arguments, code, told in (
        (["good"], 0, ""),
        (["good", "bad"], 1, "error: bad.bin: no such file"),
        (["good", "--tokenizer", "none.txt"], 3, "error: none.txt: no such file"),
        ([], 2, "PREFIX"),
        (["--help"], 0, ""),
    ):
        done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code
        assert told in done.stderr
        assert bool(done.stderr) == bool(told)


def test_a_tokenizer_that_cannot_be_read_is_no_damage_of_the_corpus(tmp_path):
    write_files(tmp_path / "good", CORPUS)
    with pytest.raises(DataError, match="no such file"):
        main([str(tmp_path / "good"), "--tokenizer", str(tmp_path / "none.txt")])


def test_hash_of_many_blocks_is_that_of_the_file(tmp_path, capsys):
    """Blocks are hashed by one thread while another counts, and all stand in the same memory."""
    content = np.random.default_rng(0).integers(5, 60_000, size=20_000_000, dtype=np.uint16).tobytes()
    (tmp_path / "large.bin").write_bytes(content)
    (tmp_path / "large.idx").write_bytes(index_bytes([1_000_000] * 20, [0, 20]))
    code, found = report_of(capsys, tmp_path / "large")
    assert (code, found["bin_sha256"]) == (0, hashlib.sha256(content).hexdigest())


def test_memory_of_a_scan_does_not_grow_with_the_corpus(tmp_path, capsys):
    """Six million sentences of two tokens: one copy of the lengths or the tokens would take 24 MB."""
    write_files(tmp_path / "small", CORPUS)
    check(capsys, tmp_path / "small")
    write_files(tmp_path / "large", [[[5, 6]] * 20] * 300_000)
    tracemalloc.start()
    try:
        code = check(capsys, tmp_path / "large")[0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert code == 0
    assert peak < 20_000_000


def test_an_index_of_another_corpus_is_told_by_its_digest(tmp_path, capsys, write_corpus):
    """The same tokens, sentences and documents: only the boundary between the documents stands elsewhere."""
    documents = [[[5, 6], [7, 8]], [[9, 10], [11, 12], [13]]]
    write_corpus(documents)
    assert check(capsys, tmp_path / "corpus")[0] == 0
    other = index_bytes([2, 2, 2, 2, 1], [0, 3, 5])
    (tmp_path / "corpus.idx").write_bytes(other)
    code, _, told = check(capsys, tmp_path / "corpus")
    assert (code, told.count("error:")) == (1, 1)
    assert "corpus.idx: belongs to another corpus, or was altered" in told
    facts = json.loads((tmp_path / "corpus.json").read_text())
    (tmp_path / "corpus.json").write_text(json.dumps({**facts, "index_sha256": None}))
    assert "each with a value of its kind" in check(capsys, tmp_path / "corpus")[2]
    del facts["index_sha256"]  # as earlier versions wrote it
    (tmp_path / "corpus.json").write_text(json.dumps(facts))
    assert check(capsys, tmp_path / "corpus")[0] == 0
