import json
import struct
import time

import numpy as np
import pytest

from megatron_bert_tp.data.corpus import Corpus, check_token_ids, check_tokenizer
from megatron_bert_tp.data.corpus_writer import CorpusWriter, token_type
from megatron_bert_tp.errors import DataError

DOCUMENTS = [[[5, 6, 7], [8]], [[9, 10]], [[11, 12], [13], [14, 15, 16, 17]]]
LENGTHS = [3, 1, 2, 2, 1, 4]
BOUNDARIES = [0, 2, 3, 6]


def index_bytes(lengths, boundaries, *, code=8, itemsize=2, magic=b"MMIDIDX\0\0", version=1, pointers=None):
    """An .idx written from the description of the format alone."""
    if pointers is None:
        pointers = [itemsize * sum(lengths[:n]) for n in range(len(lengths))]
    header = magic + struct.pack("<QBQQ", version, code, len(lengths), len(boundaries))
    body = struct.pack(f"<{len(lengths)}i{len(pointers)}q{len(boundaries)}q", *lengths, *pointers, *boundaries)
    return header + body


def write_files(prefix, idx, tokens=range(5, 18), code="H"):
    tokens = list(tokens)
    prefix.with_name(prefix.name + ".bin").write_bytes(struct.pack(f"<{len(tokens)}{code}", *tokens))
    prefix.with_name(prefix.name + ".idx").write_bytes(idx)
    return prefix


@pytest.mark.parametrize(("code", "letter", "itemsize"), [(8, "H", 2), (4, "i", 4), (5, "q", 8), (1, "B", 1)])
def test_corpus_written_by_hand_is_read_exactly(tmp_path, code, letter, itemsize):
    idx = index_bytes(LENGTHS, BOUNDARIES, code=code, itemsize=itemsize)
    corpus = Corpus.open(write_files(tmp_path / "by.hand", idx, code=letter))
    sentences = [corpus.sentence(n).tolist() for n in range(corpus.num_sentences)]
    assert sentences == [sentence for document in DOCUMENTS for sentence in document]
    assert corpus.documents.tolist() == BOUNDARIES
    assert corpus.lengths.tolist() == LENGTHS
    assert (corpus.num_documents, corpus.num_sentences, corpus.num_tokens) == (3, 6, 13)
    assert corpus.facts is None


def test_written_files_have_the_formats_bytes(write_corpus, tmp_path):
    write_corpus(DOCUMENTS)
    assert (tmp_path / "corpus.idx").read_bytes() == index_bytes(LENGTHS, BOUNDARIES)
    assert (tmp_path / "corpus.bin").read_bytes() == struct.pack("<13H", *range(5, 18))


def test_tokens_take_two_bytes_below_65500_entries_and_four_from_there():
    assert token_type(65499) == np.uint16
    assert token_type(65500) == np.int32


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


DAMAGES = {
    "wrong magic": (index_bytes(LENGTHS, BOUNDARIES, magic=b"PK\x03\x04\0\0\0\0\0"), "not an index"),
    "version 2": (index_bytes(LENGTHS, BOUNDARIES, version=2), "version 2"),
    "float tokens": (index_bytes(LENGTHS, BOUNDARIES, code=7), "type code 7"),
    "unknown type": (index_bytes(LENGTHS, BOUNDARIES, code=99), "type code 99"),
    "cut header": (index_bytes(LENGTHS, BOUNDARIES)[:20], "at least 34 bytes, this file has 20"),
    "empty file": (b"", "at least 34 bytes, this file has 0"),
    "cut body": (index_bytes(LENGTHS, BOUNDARIES)[:-8], "take 138 bytes, the file has 130"),
    "appended byte": (index_bytes(LENGTHS, BOUNDARIES) + b"\0", "take 138 bytes, the file has 139"),
    "count of 2**60": (
        b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2**60, 4) + index_bytes(LENGTHS, BOUNDARIES)[34:],
        "the file has 138",
    ),
    "another corpus": (index_bytes([3, 1, 2], [0, 3]), "expects 12 bytes, the file has 26"),
    "wide tokens": (index_bytes(LENGTHS, BOUNDARIES, code=4, itemsize=4), "expects 52 bytes, the file has 26"),
    "negative length": (index_bytes([3, -1, 4, 2, 1, 4], BOUNDARIES), "sentence 1 has -1 tokens"),
    "empty sentence": (index_bytes([3, 0, 3, 2, 1, 4], BOUNDARIES), "sentence 1 has 0 tokens"),
    "pointer too far": (
        index_bytes(LENGTHS, BOUNDARIES, pointers=[0, 6, 8, 2**40, 16, 18]),
        "sentence 3 must begin at byte 12",
    ),
    "negative pointer": (index_bytes(LENGTHS, BOUNDARIES, pointers=[0, 6, 8, 12, 16, -2]), "sentence 5"),
    "documents fall": (index_bytes(LENGTHS, [0, 5, 3, 6]), "must rise from 0 to 6"),
    "documents overflow": (index_bytes(LENGTHS, [0, 2**63 - 1, -2, 6]), "must rise from 0 to 6"),
    "documents begin late": (index_bytes(LENGTHS, [1, 2, 3, 6]), "must rise from 0 to 6"),
    "documents end early": (index_bytes(LENGTHS, [0, 2, 3, 5]), "must rise from 0 to 6"),
    "no sentence": (index_bytes([], [0, 0]), "an empty corpus"),
    "no document": (index_bytes(LENGTHS, [0]), "an empty corpus"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_index_is_refused_within_a_second(tmp_path, damage):
    idx, told = DAMAGES[damage]
    prefix = write_files(tmp_path / "damaged", idx)
    started = time.monotonic()
    with pytest.raises(DataError, match=told):
        Corpus.open(prefix)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("size", [0, 1, 25, 27])
def test_bin_of_another_size_is_refused_with_both_sizes(tmp_path, size):
    prefix = write_files(tmp_path / "cut", index_bytes(LENGTHS, BOUNDARIES))
    content = (tmp_path / "cut.bin").read_bytes() + b"\0"
    (tmp_path / "cut.bin").write_bytes(content[:size])
    with pytest.raises(DataError, match=f"{size} bytes|has {size}"):
        Corpus.open(prefix)


@pytest.mark.parametrize("missing", ["bin", "idx"])
def test_missing_file_is_named_with_the_way_out(write_corpus, tmp_path, missing):
    write_corpus(DOCUMENTS)
    (tmp_path / f"corpus.{missing}").unlink()
    with pytest.raises(DataError, match=rf"corpus\.{missing}: no such file; make it with .*preprocess"):
        Corpus.open(tmp_path / "corpus")


def test_facts_of_another_corpus_and_foreign_json_are_refused(write_corpus, tmp_path):
    write_corpus(DOCUMENTS)
    write_corpus(DOCUMENTS[:2], name="other")
    (tmp_path / "corpus.json").write_bytes((tmp_path / "other.json").read_bytes())
    with pytest.raises(DataError, match="different corpora"):
        Corpus.open(tmp_path / "corpus")
    for content in ("[]", '{"documents": 3}', "no json"):
        (tmp_path / "corpus.json").write_text(content)
        with pytest.raises(DataError, match=r"corpus\.json: "):
            Corpus.open(tmp_path / "corpus")


def test_id_outside_the_vocabulary_is_named_with_its_sentence(tmp_path):
    corpus = Corpus.open(write_files(tmp_path / "high", index_bytes(LENGTHS, BOUNDARIES)))
    check_token_ids(corpus, 18)
    with pytest.raises(DataError, match=r"high\.bin: .*0\.\.14, but sentence 5 holds 15"):
        check_token_ids(corpus, 15)
    idx = index_bytes(LENGTHS, BOUNDARIES, code=4, itemsize=4)
    negative = Corpus.open(write_files(tmp_path / "negative", idx, [5, 6, 7, -8, *range(9, 18)], code="i"))
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
