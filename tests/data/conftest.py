"""Small corpora and vocabularies, made without the code under test where a test compares with it."""

from pathlib import Path

import numpy as np
import pytest

from megatron_bert_tp import preprocess as command
from megatron_bert_tp.config.command_line import run_command
from megatron_bert_tp.data.corpus.mapped import Corpus
from megatron_bert_tp.data.corpus.writer import CorpusWriter
from megatron_bert_tp.data.tokenizer import Tokenizer
from tests.data.corpora import SPECIAL
from tests.data.corpus_reader import read_corpus

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"


@pytest.fixture(scope="session")
def vocabulary_file(tmp_path_factory) -> Path:
    """200 entries: the special ones, w5..w149, and the pieces ##p150..##p199."""
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    words = [f"w{n}" for n in range(5, 150)] + [f"##p{n}" for n in range(150, 200)]
    path.write_text("".join(f"{entry}\n" for entry in SPECIAL + words), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(vocabulary_file) -> Tokenizer:
    return Tokenizer.load(vocabulary_file, lowercase=True)


@pytest.fixture
def write_corpus(tmp_path, tokenizer):
    """Function that writes documents (lists of sentences of ids) and opens them as a corpus."""

    def write(documents: list[list[list[int]]], name: str = "corpus") -> Corpus:
        with CorpusWriter(tmp_path / name, tokenizer) as writer:
            for sentences in documents:
                tokens = np.array([token for sentence in sentences for token in sentence])
                writer.add_document(tokens, [len(sentence) for sentence in sentences])
        return Corpus.open(tmp_path / name)

    return write


@pytest.fixture(scope="session")
def shared_file():
    """Function that gives a file of the real data beside the checkout, or skips the test."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"real text ../shared/data/{name} is not on this machine")
        return path.resolve()

    return find


@pytest.fixture
def corpus_of(tmp_path, vocabulary_file):
    """Function that runs the command on files and reads the corpus, or None where it failed."""

    def make(*arguments):
        rest = ["--tokenizer", vocabulary_file, "--output", tmp_path / "out", "--overwrite", "--workers", 1]
        given = [str(argument) for argument in (*arguments, *rest)]
        code = run_command(command.main, usage="", arguments=given)
        return read_corpus(tmp_path / "out") if code == 0 else None

    return make
