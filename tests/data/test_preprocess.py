import hashlib
import json
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bert_tp import preprocess as command
from megatron_bert_tp.config.command_line import run_command
from megatron_bert_tp.data.corpus import writer
from megatron_bert_tp.data.corpus.mapped import Corpus
from megatron_bert_tp.data.preprocessing import preprocess as preprocessing
from megatron_bert_tp.data.preprocessing.documents import TextLayout
from megatron_bert_tp.data.preprocessing.preprocess import preprocess
from megatron_bert_tp.data.tokenizer import Tokenizer
from megatron_bert_tp.errors import DataError
from tests.data.corpus_reader import read_corpus

TEXT = "w5 w6. w7 w8p150.\n\nw9 w10\n\n\x00\u200b\n\nw11. w12. W13"


def run(*arguments):
    return run_command(command.main, usage="", arguments=[str(argument) for argument in arguments])


def sentences_of(corpus, tokenizer):
    return [tokenizer.tokens(corpus.sentence(n)) for n in range(corpus.num_sentences)]


def test_command_makes_a_corpus_of_the_texts_sentences(tmp_path, vocabulary_file, tokenizer, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "w14\nw15"}))
    output = tmp_path / "new" / "corpus"
    rest = ("--tokenizer", vocabulary_file, "--output", output)
    assert run(tmp_path / "a.txt", tmp_path / "b.jsonl", "--field", "body", "--sentences-per-line", *rest) == 0
    corpus = Corpus.open(output)
    expected = ["w5 w6 [UNK] w7 w8 ##p150 [UNK]", "w9 w10", "w11 [UNK] w12 [UNK] w13", "w14", "w15"]
    assert [" ".join(tokens) for tokens in sentences_of(corpus, tokenizer)] == expected
    assert corpus.documents.tolist() == [0, 1, 2, 3, 5]
    told = " ".join(capsys.readouterr().out.split())
    assert "documents 4 of one sentence 3 (75%) sentences 5 tokens 16" in told
    assert "letters lowercased unknown tokens 4 (25.0000%)" in told
    assert "dropped 1 documents without a token, 1 sentences without a token" in told


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, vocabulary_file, monkeypatch, workers):
    monkeypatch.setattr(preprocessing, "CHUNK", 1000)
    path = tmp_path / "a.txt"
    path.write_text(
        "\n\n".join(f"w{5 + n % 100} w{6 + n % 90}. W{5 + n % 7} w9p{150 + n % 50}!" for n in range(600))
    )
    for name, count in {"one": 1, "many": workers}.items():
        preprocess([path], vocabulary_file, tmp_path / name, workers=count)
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"many.{suffix}").read_bytes()
    assert Corpus.open(tmp_path / "many").num_documents == 600


def test_trained_vocabulary_makes_a_corpus_without_unknown_tokens(tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("A small cat sat. It was small.\n\nThe cat that sat was small." * 9)
    vocabulary, output = tmp_path / "vocab.txt", tmp_path / "corpus"
    assert run("train-tokenizer", text, "--size", 120, "--output", vocabulary) == 0
    assert run(text, "--tokenizer", vocabulary, "--output", output) == 0
    assert "entries" in capsys.readouterr().out
    assert Tokenizer.load(vocabulary, lowercase=True).vocabulary.unknown_id not in Corpus.open(output).tokens


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("absent.txt", None, "no such file"),
        ("empty.txt", b"", "no input file holds a byte"),
        ("blank.txt", b"\n\n", "no sentence with a token"),
        ("nul.txt", b"\0\0", "no sentence with a token"),
        ("bad.jsonl", b"{", "line 1: not JSON"),
    ],
)
def test_unusable_input_is_one_message_and_exit_3(tmp_path, vocabulary_file, capsys, name, content, told):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run(tmp_path / name, "--tokenizer", vocabulary_file, "--output", tmp_path / "out") == 3
    message = capsys.readouterr().err
    assert told in message
    assert "Traceback" not in message
    assert not list(tmp_path.glob("out.*"))


def told_by(capsys, *arguments) -> str:
    """Message of a command that must fail, without a traceback."""
    assert run(*arguments) == 3
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_output_that_cannot_be_written_is_named(tmp_path, vocabulary_file, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "file").write_text("in the way")
    place = tmp_path / "file" / "out"
    told = told_by(capsys, tmp_path / "a.txt", "--tokenizer", vocabulary_file, "--output", place)
    assert f"{place}.bin: cannot be written" in told
    assert "choose another --output" in told
    told = told_by(capsys, "train-tokenizer", tmp_path / "a.txt", "--size", 200, "--output", place)
    assert f"{place}: cannot be written" in told
    (tmp_path / "out.bin").mkdir()
    rest = ("--tokenizer", vocabulary_file, "--output", tmp_path / "out", "--overwrite")
    assert "out.bin: cannot be written" in told_by(capsys, tmp_path / "a.txt", *rest)
    (tmp_path / "out.bin").rmdir()
    assert run(tmp_path / "a.txt", *rest) == 0  # only the names were missing
    assert sorted(path.name for path in tmp_path.glob("out.*")) == ["out.bin", "out.idx", "out.json"]


@pytest.mark.parametrize("num_documents", [300, 3000])  # the disk is full when closing, or when writing
def test_a_disk_that_fills_is_named_and_nothing_is_left(tmp_path, vocabulary_file, capsys, num_documents):
    (tmp_path / "a.txt").write_text("\n\n".join(["w5 w6 w7 w8. w9 w10 w11 w12."] * num_documents))
    arguments = (tmp_path / "a.txt", "--tokenizer", vocabulary_file, "--output", tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        told = told_by(capsys, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "out.bin: cannot be written" in told
    assert not list(tmp_path.glob("out.*"))


def test_input_that_cannot_be_read_is_named(tmp_path, vocabulary_file, capsys, monkeypatch):
    """A superuser may read everything, so the refusal is made up."""
    (tmp_path / "a.txt").write_text(TEXT)
    opened = Path.open

    def refusing(path, *arguments, **options):
        if path.name in refused:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)
    for name in ("a.txt", vocabulary_file.name):
        refused = {name}
        arguments = (tmp_path / "a.txt", "--tokenizer", vocabulary_file, "--output", tmp_path / "out")
        told = told_by(capsys, *arguments)
        assert f"{name}: cannot be read" in told
        assert "Permission denied" in told


def test_output_never_replaces_an_input(tmp_path, vocabulary_file):
    (tmp_path / "text.json").write_text('{"text": "w5"}')
    with pytest.raises(DataError, match="would replace the input"):
        preprocess([tmp_path / "text.json"], vocabulary_file, tmp_path / "text")
    assert (tmp_path / "text.json").read_text() == '{"text": "w5"}'


def test_module_runs_as_a_command(tmp_path, vocabulary_file):
    (tmp_path / "a.txt").write_text(TEXT)
    arguments = [
        tmp_path / "a.txt",
        "--tokenizer",
        vocabulary_file,
        "--output",
        tmp_path / "out",
        "--workers",
        "2",
    ]
    subprocess.run([sys.executable, "-m", "megatron_bert_tp.preprocess", *map(str, arguments)], check=True)
    assert Corpus.open(tmp_path / "out").num_documents == 3


def test_novel_comes_back_as_its_own_words(shared_file, tmp_path):
    novel = shared_file("novels/Doyle_Hound_1902.txt")
    vocabulary = shared_file("vocab/bert-large-uncased-vocab.txt")
    report = preprocess([novel], vocabulary, tmp_path / "hound", layout=TextLayout(document_per_file=True))
    corpus, tokenizer = Corpus.open(tmp_path / "hound"), Tokenizer.load(vocabulary, lowercase=True)
    assert report.facts.documents == 1
    assert 2000 < corpus.num_sentences < 6000
    # Splitting into sentences moves no token: the whole text encodes to the same ids.
    assert corpus.tokens.tolist() == tokenizer.encode_batch([novel.read_text("utf-8-sig")])[0]


def test_an_existing_corpus_is_replaced_only_when_asked_for(tmp_path, vocabulary_file, capsys):
    (tmp_path / "a.txt").write_text("w5 w6.")
    arguments = (tmp_path / "a.txt", "--tokenizer", vocabulary_file, "--output", tmp_path / "out")
    assert run(*arguments) == 0
    (tmp_path / "a.txt").write_text("w7 w8. w9.")
    before = (tmp_path / "out.bin").read_bytes()
    told = told_by(capsys, *arguments)
    assert "out.idx" in told
    assert "exists already; choose another --output, or replace it with --overwrite" in told
    assert (tmp_path / "out.bin").read_bytes() == before
    assert run(*arguments, "--overwrite") == 0
    assert (tmp_path / "out.bin").read_bytes() != before
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("mine")
    told = told_by(capsys, "train-tokenizer", tmp_path / "a.txt", "--size", 100, "--output", vocabulary)
    assert "exists already" in told
    assert vocabulary.read_text() == "mine"


@pytest.mark.parametrize("name", ["train-tokeniser", "train_tokenizer", "train-tokenzier", "TRAIN-TOKENIZER"])
def test_a_misspelled_subcommand_is_recognised(name, capsys):
    assert "did you mean train-tokenizer?" in told_by(capsys, name, "a.txt", "--size", 100)


def test_fewer_entries_than_asked_for_are_told(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("A small cat sat. It was small.\n\nThe cat that sat was small." * 9)
    assert run("train-tokenizer", tmp_path / "a.txt", "--size", 5000, "--output", tmp_path / "v.txt") == 0
    size = len((tmp_path / "v.txt").read_text().splitlines())
    assert f"v.txt: {size} entries, not the 5,000 asked for" in capsys.readouterr().out


def test_index_of_many_blocks_points_at_every_sentence(tmp_path, vocabulary_file, monkeypatch):
    monkeypatch.setattr(writer, "_BLOCK", 7)
    lines = [" ".join(["w5", "w6", "w7"][: n % 3 + 1]) for n in range(50)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    layout = TextLayout(sentence_per_line=True)
    preprocess([tmp_path / "a.txt"], vocabulary_file, tmp_path / "out", layout=layout)
    assert read_corpus(tmp_path / "out") == [[[5, 6, 7][: n % 3 + 1] for n in range(50)]]


def test_report_counts_what_a_slow_count_finds(shared_file, tmp_path, capsys):
    novel = shared_file("novels/Doyle_Hound_1902.txt")
    vocabulary = shared_file("vocab/bert-large-cased-vocab.txt")
    arguments = (novel, "--tokenizer", vocabulary, "--cased", "--output", tmp_path / "a", "--document-per-file")
    assert run(*arguments[:-1]) == 0
    documents = read_corpus(tmp_path / "a")
    facts = json.loads((tmp_path / "a.json").read_text())
    flat = [token for document in documents for sentence in document for token in sentence]
    sizes = [sum(map(len, document)) for document in documents]
    lengths = [len(sentence) for document in documents for sentence in document]
    assert facts["documents"] == len(documents)
    assert facts["tokens"] == len(flat)
    assert facts["bin_sha256"] == hashlib.sha256((tmp_path / "a.bin").read_bytes()).hexdigest()
    report = facts["report"]
    unknown = vocabulary.read_text().split("\n").index("[UNK]")
    assert report["unknown_tokens"] == flat.count(unknown)
    assert report["single_sentence_documents"] == sum(len(document) == 1 for document in documents)
    assert report["longest_sentence"] == {"tokens": max(lengths), "number": lengths.index(max(lengths))}
    for name, count in report["tokens_per_document"].items():
        first, _, last = name.partition("-")
        assert count == sum(int(first) <= size <= int(last or first) for size in sizes)
    assert sum(report["tokens_per_document"].values()) == len(documents)
    told = capsys.readouterr().out
    assert facts["bin_sha256"] in told
    assert "MB/s" in told


@pytest.mark.parametrize("name", ["", ".", "..", "x" * 250, "loop", "folder"])
def test_an_output_that_can_be_no_prefix_is_one_message(tmp_path, vocabulary_file, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "loop.lock.unfinished").symlink_to("loop.lock.unfinished")
    (tmp_path / "loop.bin").symlink_to("loop.bin")
    (tmp_path / "folder.progress.json").mkdir()
    before = sorted(tmp_path.iterdir())
    told = told_by(capsys, "a.txt", "--tokenizer", vocabulary_file, "--output", name)
    assert "choose another --output" in told or "is a folder, not the prefix" in told
    assert sorted(tmp_path.iterdir()) == before


def test_output_never_replaces_the_tokenizer_nor_a_text_that_is_trained_on(tmp_path, tokenizer, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    tokenizer.library.save(str(tmp_path / "tokenizer.json"))
    before = (tmp_path / "tokenizer.json").read_bytes()
    given = ("--tokenizer", tmp_path / "tokenizer.json", "--output", tmp_path / "tokenizer", "--overwrite")
    assert "would replace the input" in told_by(capsys, tmp_path / "a.txt", *given)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    given = ("--size", 100, "--output", tmp_path / "a.txt", "--overwrite")
    assert "would replace an input" in told_by(capsys, "train-tokenizer", tmp_path / "a.txt", *given)
    assert (tmp_path / "a.txt").read_text() == TEXT


def test_a_disk_that_fills_leaves_the_old_vocabulary(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("A small cat sat. It was small.\n\nThe cat that sat was small." * 9)
    (tmp_path / "v.txt").write_text("mine")
    given = ("train-tokenizer", tmp_path / "a.txt", "--size", 120, "--output", tmp_path / "v.txt", "--overwrite")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        assert "v.txt: cannot be written" in told_by(capsys, *given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "v.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "v.txt"]


def test_a_vocabulary_that_changes_between_two_calls_is_read_again(tmp_path, vocabulary_file):
    vocabulary = tmp_path / "v.txt"
    (tmp_path / "a.txt").write_text("w5 w6")
    words = vocabulary_file.read_text().split()
    for name, entries in {"one": words, "two": [*words[:5], "w0", *words[5:]]}.items():
        vocabulary.write_text("\n".join(entries))
        preprocess([tmp_path / "a.txt"], vocabulary, tmp_path / name)
    assert read_corpus(tmp_path / "one") == [[[5, 6]]]
    assert read_corpus(tmp_path / "two") == [[[6, 7]]]


def test_the_json_has_the_digest_of_the_index(tmp_path, vocabulary_file):
    (tmp_path / "a.txt").write_text("w5 w6. w7.\n\nw8 w9 w10\n\nw11. w12.")
    preprocess([tmp_path / "a.txt"], vocabulary_file, tmp_path / "out")
    content = struct.pack("<3Q5i4q", 2, 5, 4, *[3, 2, 3, 2, 2], *[0, 2, 3, 5])
    assert json.loads((tmp_path / "out.json").read_text())["index_sha256"] == hashlib.sha256(content).hexdigest()
