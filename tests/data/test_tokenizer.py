import subprocess
import sys

import numpy as np
import pytest
from tokenizers.implementations import BertWordPieceTokenizer

from megatron_bert_tp.data.preprocessing.vocabulary_training import train_wordpiece
from megatron_bert_tp.data.tokenizer import Tokenizer
from megatron_bert_tp.errors import DataError
from tests.data.corpora import SPECIAL

SENTENCES = [
    f"the {a} {b} unhappily walks, Über {b}{a}." for a in ("cat", "dog", "tree") for b in ("big", "old")
] * 4
TRAIN = """
import sys
from pathlib import Path
from megatron_bert_tp.data.preprocessing.vocabulary_training import train_wordpiece
train_wordpiece(lambda: {sentences!r}, 200, True, Path(sys.argv[1]))
"""


def test_ids_of_a_vocabulary_file_are_its_line_numbers(tokenizer):
    vocabulary = tokenizer.vocabulary
    assert vocabulary.special_ids == (0, 1, 2, 3, 4)
    assert tokenizer.size == 200
    assert tokenizer.tokens([4, 5, 199]) == ["[MASK]", "w5", "##p199"]
    assert np.flatnonzero(~vocabulary.starts_word).tolist() == list(range(150, 200))
    assert vocabulary.ordinary_ids.tolist() == list(range(5, 200))


def test_encoding_adds_no_special_tokens_and_reads_none(tokenizer):
    assert tokenizer.encode_batch(["w5 W6", "w7p150 nothing", "[MASK]", ""]) == [
        [5, 6],
        [7, 150, 1],
        [1, 1, 1],
        [],
    ]


def test_decoding_joins_pieces_and_leaves_special_tokens_out(tokenizer):
    assert tokenizer.decode([2, 7, 150, 8, 3, 0]) == "w7p150 w8"


@pytest.mark.parametrize("name", ["bert-large-uncased-vocab.txt", "bert-large-cased-vocab.txt"])
def test_text_file_and_json_agree_with_the_librarys_bert_tokenizer(name, shared_file, tmp_path):
    vocabulary = shared_file(f"vocab/{name}")
    lowercase = "uncased" in name
    library = BertWordPieceTokenizer(str(vocabulary), lowercase=lowercase)
    library.enable_truncation(4)
    library.save(str(tmp_path / "tokenizer.json"))
    library.no_truncation()
    texts = ["Élan vital: the U.S. naïve café; 東京 [SEP]", "Unaffable! " * 20]
    expected = [library.encode(texts[1], add_special_tokens=False).ids]
    for path in (vocabulary, tmp_path / "tokenizer.json"):
        tokenizer = Tokenizer.load(path, lowercase)
        assert tokenizer.encode_batch(texts[1:]) == expected
        assert tokenizer.vocabulary.sep_id not in tokenizer.encode_batch(texts[:1])[0]
        assert tokenizer.lowercase == lowercase
        assert tokenizer.vocabulary == Tokenizer.load(vocabulary, lowercase).vocabulary


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("\n".join(SPECIAL[:4]) + "\nword\n", r"\[MASK\] not found among its 5 entries.*train-tokenizer"),
        ("\n".join([*SPECIAL, "word", "word"]) + "\n", r"'word' stands in lines \[6, 7\]"),
        ("", "0"),
    ],
)
def test_unusable_vocabulary_file_is_refused(tmp_path, content, told):
    path = tmp_path / "vocab.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=f"vocab.txt: .*{told}"):
        Tokenizer.load(path, lowercase=True)


def test_missing_binary_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        Tokenizer.load(tmp_path / "absent.txt", lowercase=True)
    (tmp_path / "binary.txt").write_bytes(b"word\n\xff\xfe")
    with pytest.raises(DataError, match="byte 5 is not UTF-8"):
        Tokenizer.load(tmp_path / "binary.txt", lowercase=True)
    (tmp_path / "foreign.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "foreign.json", lowercase=True)


def test_a_directory_is_refused_with_the_file_to_give(tmp_path, vocabulary_file):
    with pytest.raises(DataError, match=f"is a directory; give the file in it: {vocabulary_file}$"):
        Tokenizer.load(vocabulary_file.parent, lowercase=True)
    with pytest.raises(DataError, match=r"is a directory.*none is there"):
        Tokenizer.load(tmp_path, lowercase=True)


def test_trained_vocabulary_is_the_same_in_every_process(tmp_path):
    written = []
    for number in range(3):
        path = tmp_path / f"{number}.txt"
        subprocess.run([sys.executable, "-c", TRAIN.format(sentences=SENTENCES), str(path)], check=True)
        written.append(path.read_bytes())
    assert written[0] == written[1] == written[2]
    assert written[0].decode().split("\n")[:5] == SPECIAL


def test_trained_vocabulary_knows_all_its_text(tmp_path):
    path = tmp_path / "vocab.txt"
    size = train_wordpiece(lambda: iter(SENTENCES), 200, True, path)
    tokenizer = Tokenizer.load(path, lowercase=True)
    assert tokenizer.size == size <= 200
    for ids, sentence in zip(tokenizer.encode_batch(SENTENCES), SENTENCES, strict=True):
        assert tokenizer.vocabulary.unknown_id not in ids
        assert "".join(tokenizer.decode(ids).split()) == "".join(sentence.lower().replace("ü", "u").split())
    assert len(tokenizer.encode_batch(["unhappily"])[0]) == 1


def test_training_without_text_or_with_too_small_a_size_is_refused(tmp_path):
    with pytest.raises(DataError, match="give more text"):
        train_wordpiece(list, 200, True, tmp_path / "vocab.txt")
    with pytest.raises(DataError, match="a vocabulary of 7 entries cannot hold"):
        train_wordpiece(lambda: SENTENCES, 7, True, tmp_path / "vocab.txt")
