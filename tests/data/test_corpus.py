import hashlib
import itertools
import json
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_bert_tp.data.corpus import mapped
from megatron_bert_tp.data.corpus.index import open_plain, read_array, release
from megatron_bert_tp.data.corpus.mapped import Corpus, check_token_ids, check_tokenizer
from megatron_bert_tp.data.corpus.unigram import unigram_counts
from megatron_bert_tp.data.corpus.writer import CorpusWriter, token_type
from megatron_bert_tp.data.tokenizer import Tokenizer
from megatron_bert_tp.errors import DataError
from tests.data.corpora import SPECIAL
from tests.data.index_files import index_bytes, read_files, write_files

DOCUMENTS = [[[5, 6, 7], [8]], [[9, 10]], [[11, 12], [13], [14, 15, 16, 17]]]
WITH_EMPTY = [[], DOCUMENTS[0], [], [], *DOCUMENTS[1:], []]


def documents_of(corpus):
    """Everything that a corpus says of its text, as lists."""
    sentences = [corpus.sentence(n).tolist() for n in range(corpus.num_sentences)]
    bounds = corpus.documents.tolist()
    return [sentences[first:last] for first, last in itertools.pairwise(bounds)]


def random_documents(num_documents, *, largest, seed=0):
    """Documents of 0 to 11 sentences of 1 to 39 tokens with ids up to ``largest``."""
    draws = np.random.default_rng(seed)
    sizes = [draws.integers(1, 40, size=draws.integers(0, 12)) for _ in range(num_documents)]
    return [[draws.integers(0, largest + 1, size=n).tolist() for n in lengths] for lengths in sizes]


# Read by us, written by another


@pytest.mark.parametrize(
    ("letter", "largest"),
    [("H", 2**16 - 1), ("i", 2**31 - 1), ("q", 2**63 - 2), ("B", 255), ("b", 127), ("h", 2**15 - 1)],
)
def test_corpus_written_from_the_description_is_read_exactly(tmp_path, letter, largest):
    documents = random_documents(200, largest=largest)
    corpus = Corpus.open(write_files(tmp_path / "by.hand", documents, letter=letter))
    assert documents_of(corpus) == documents
    sentences = [sentence for document in documents for sentence in document]
    assert corpus.tokens.tolist() == [token for sentence in sentences for token in sentence]
    assert corpus.lengths.tolist() == [len(sentence) for sentence in sentences]
    assert (corpus.num_documents, corpus.num_sentences) == (200, len(sentences))
    assert corpus.num_tokens == sum(map(len, sentences))
    assert corpus.facts is None


def test_documents_without_sentences_are_kept_at_any_place(tmp_path):
    corpus = Corpus.open(write_files(tmp_path / "empty", WITH_EMPTY))
    assert documents_of(corpus) == WITH_EMPTY
    assert corpus.documents.tolist() == [0, 0, 2, 2, 2, 3, 6, 6]
    assert [corpus.document_of(n) for n in range(6)] == [1, 1, 4, 5, 5, 5]


# Written by us, read by another


@pytest.fixture(scope="module")
def large_tokenizer(tmp_path_factory):
    """70,000 entries, so that tokens take four bytes."""
    path = tmp_path_factory.mktemp("large") / "vocab.txt"
    path.write_text("".join(f"{entry}\n" for entry in [*SPECIAL, *(f"w{n}" for n in range(5, 70_000))]))
    return Tokenizer.load(path, lowercase=True)


@pytest.mark.parametrize(("name", "letter"), [("tokenizer", "H"), ("large_tokenizer", "i")])
def test_written_corpus_is_read_exactly_by_an_independent_reader(tmp_path, request, name, letter):
    tokenizer = request.getfixturevalue(name)
    documents = [[*document, [5]] for document in random_documents(60, largest=tokenizer.size - 1)]
    with CorpusWriter(tmp_path / "ours", tokenizer) as writer:
        for sentences in documents:
            tokens = np.array([token for sentence in sentences for token in sentence])
            writer.add_document(tokens, [len(sentence) for sentence in sentences])
    assert read_files(tmp_path / "ours") == (letter, documents)
    assert documents_of(Corpus.open(tmp_path / "ours")) == documents


def test_written_files_have_the_formats_bytes(write_corpus, tmp_path):
    write_corpus(DOCUMENTS)
    assert (tmp_path / "corpus.bin").read_bytes() == struct.pack("<13H", *range(5, 18))
    expected = bytes.fromhex("4d4d494449445800000100000000000000080600000000000000" + "0400000000000000")
    expected += struct.pack("<6i6q4q", 3, 1, 2, 2, 1, 4, 0, 6, 8, 12, 16, 18, 0, 2, 3, 6)
    assert (tmp_path / "corpus.idx").read_bytes() == expected == index_bytes([3, 1, 2, 2, 1, 4], [0, 2, 3, 6])


def test_tokens_take_two_bytes_below_65500_entries_and_four_from_there():
    assert token_type(65499) == np.uint16
    assert token_type(65500) == np.int32


# Places in the text


def test_starts_of_any_shape_end_with_the_number_of_tokens(tmp_path):
    corpus = Corpus.open(write_files(tmp_path / "corpus", WITH_EMPTY, letter="i"))
    assert corpus.starts_of(np.arange(7)).tolist() == [0, 3, 4, 6, 8, 9, 13]
    assert corpus.starts_of(np.array([[6, 0], [2, 6]])).tolist() == [[13, 0], [4, 13]]
    assert corpus.starts_of(corpus.documents).tolist() == [0, 0, 4, 4, 4, 6, 13, 13]
    assert corpus.starts_of(np.zeros((0, 2), dtype=np.int64)).shape == (0, 2)
    with pytest.raises(IndexError):
        corpus.starts_of(np.array([7]))
    sentences = [corpus.sentence_at(token) for token in range(13)]
    assert sentences == [0, 0, 0, 1, 2, 2, 3, 3, 4, 5, 5, 5, 5]


@pytest.mark.parametrize("block", [1, 4, 5, 1 << 20])
def test_digest_is_of_item_size_lengths_and_boundaries(tmp_path, monkeypatch, block):
    monkeypatch.setattr(mapped, "_BLOCK", block)
    corpus = Corpus.open(write_files(tmp_path / "corpus", DOCUMENTS))
    content = struct.pack("<3Q6i4q", 2, 6, 4, *[3, 1, 2, 2, 1, 4], *[0, 2, 3, 6])
    assert corpus.digest == hashlib.sha256(content).hexdigest()


def test_digest_differs_with_every_length_boundary_and_item_size(tmp_path):
    changed = [
        DOCUMENTS,
        [DOCUMENTS[0], [[9], [10]], DOCUMENTS[2]],
        [DOCUMENTS[0] + DOCUMENTS[1], DOCUMENTS[2]],
        [*DOCUMENTS, []],
        [[[5, 6], [7, 8]], *DOCUMENTS[1:]],
    ]
    digests = {Corpus.open(write_files(tmp_path / "corpus", documents)).digest for documents in changed}
    digests.add(Corpus.open(write_files(tmp_path / "corpus", DOCUMENTS, letter="i")).digest)
    other_ids = [[[token + 1 for token in sentence] for sentence in document] for document in DOCUMENTS]
    digests.add(Corpus.open(write_files(tmp_path / "corpus", other_ids)).digest)
    assert len(digests) == 6


# Memory


def test_nothing_that_grows_with_the_corpus_is_copied(tmp_path):
    """Two million sentences: one copy of lengths, pointers or tokens would take 8, 16 or 16 MB."""
    num_sentences = 2_000_000
    lengths = [4] * num_sentences
    Corpus.open(write_files(tmp_path / "small", DOCUMENTS))  # what the first time loads is not counted
    (tmp_path / "large.idx").write_bytes(index_bytes(lengths, range(0, num_sentences + 1, 20)))
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(8 * num_sentences)
    chosen = np.arange(0, num_sentences, 1000)
    tracemalloc.start()
    try:
        corpus = Corpus.open(tmp_path / "large")
        assert corpus.starts_of(chosen)[-1] == 4 * chosen[-1]
        assert corpus.sentence_at(corpus.num_tokens - 1) == num_sentences - 1
        assert corpus.document_of(num_sentences - 1) == num_sentences // 20 - 1
        check_token_ids(corpus, 1)
        opened = tracemalloc.get_traced_memory()[1]
        assert unigram_counts(corpus, np.arange(1000), 3).tolist() == [80_000, 0, 0]
        counted = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert opened < 6_000_000
    assert counted < 40_000_000  # a block of a million tokens as int64, and its mask


def test_arrays_are_views_of_the_file_that_cannot_be_written(tmp_path):
    corpus = Corpus.open(write_files(tmp_path / "corpus", DOCUMENTS))
    for array in (corpus.tokens, corpus.lengths, corpus.pointers, corpus.documents):
        assert not array.flags.owndata
        before = array.tolist()
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        release(array)
        assert array.tolist() == before


def test_a_file_that_ends_while_it_is_read_is_told_with_the_place(tmp_path):
    (tmp_path / "short").write_bytes(bytes(range(10)))
    with open_plain(tmp_path / "short") as file:
        numbers = np.zeros(5, dtype=np.int8)
        read_array(file, numbers, offset=5)
        assert numbers.tolist() == [5, 6, 7, 8, 9]
        with pytest.raises(DataError, match="short: ends at byte 10 while it is read"):
            read_array(file, np.zeros(2, dtype=np.int64), offset=0)


def test_a_pickled_corpus_is_its_prefix_and_is_checked_for_change(tmp_path):
    corpus = Corpus.open(write_files(tmp_path / "corpus", random_documents(500, largest=99)))
    content = pickle.dumps(corpus)
    assert len(content) < 1000
    assert documents_of(pickle.loads(content)) == documents_of(corpus)
    write_files(tmp_path / "corpus", DOCUMENTS)
    with pytest.raises(DataError, match=rf"had {corpus.num_sentences} sentences.*now it has 6 and 13"):
        pickle.loads(content)


# What stands beside the tokens


def test_facts_stand_beside_the_corpus(write_corpus, tmp_path, tokenizer):
    corpus = write_corpus(DOCUMENTS)
    written = json.loads((tmp_path / "corpus.json").read_text())
    assert written["largest_id"] == 17
    assert written["tokenizer_sha256"] == tokenizer.sha256
    assert corpus.facts is not None
    check_tokenizer(corpus, sha256=tokenizer.sha256, lowercase=True)
    with pytest.raises(DataError, match="made with the tokenizer"):
        check_tokenizer(corpus, sha256="0" * 64, lowercase=True)
    with pytest.raises(DataError, match="lowercase False"):
        check_tokenizer(corpus, sha256=tokenizer.sha256, lowercase=False)


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_id_outside_the_vocabulary_is_named_with_its_sentence(tmp_path, monkeypatch, block):
    monkeypatch.setattr(mapped, "_BLOCK", block)
    corpus = Corpus.open(write_files(tmp_path / "high", DOCUMENTS))
    check_token_ids(corpus, 18)
    with pytest.raises(DataError, match=r"high\.bin: .*0\.\.14, but sentence 5 holds 15"):
        check_token_ids(corpus, 15)
    negative = Corpus.open(write_files(tmp_path / "negative", [[[5, 6, 7], [-8]], DOCUMENTS[1]], letter="i"))
    with pytest.raises(DataError, match="sentence 1 holds -8"):
        check_token_ids(negative, 200)


def test_interrupted_writing_leaves_nothing_and_keeps_the_old_corpus(write_corpus, tmp_path, tokenizer):
    write_corpus(DOCUMENTS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted():
        with CorpusWriter(tmp_path / "corpus", tokenizer) as writer:
            writer.add_document(np.array([5, 6]), [1, 1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_corpus_without_a_document_is_not_written(tmp_path, tokenizer):
    with pytest.raises(DataError, match="nothing to write"), CorpusWriter(tmp_path / "empty", tokenizer):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ["bin", "idx", "json"])
def test_a_prefix_given_with_an_ending_is_told_as_such(write_corpus, ending):
    corpus = write_corpus([[[5, 6], [7]]])
    with pytest.raises(DataError, match=rf"named by its PREFIX, without an ending: give {corpus.prefix}$"):
        Corpus.open(Path(f"{corpus.prefix}.{ending}"))
