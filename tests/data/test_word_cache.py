import random

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers
from tokenizers.implementations import BertWordPieceTokenizer

from megatron_bert_tp.data.preprocessing import word_cache
from megatron_bert_tp.data.preprocessing.word_cache import WordCache
from megatron_bert_tp.data.tokenizer import Tokenizer
from tests.data.corpora import SPECIAL


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """Every letter, digit and mark of Latin-1 alone and as a piece, and some characters of other scripts."""
    singles = [chr(code) for code in range(33, 383) if chr(code).isprintable() and chr(code).strip()]
    entries = dict.fromkeys([*SPECIAL, *singles, *(f"##{c}" for c in singles), "the", "##ing", "中", "文", "。"])
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("".join(f"{entry}\n" for entry in entries), encoding="utf-8")
    return path


def odd_sentences(count):
    """Random runs of all kinds of characters, spaces, controls and combining marks."""
    draws = random.Random(count)
    more = (0xFEFF, 0xFFFD, 0x1F468, 0x10FFFF, 0xFF01)
    odd = [chr(code) for code in (*range(0x3100), *range(0x4E00, 0x4E40), *more)]
    plain = "the cat is sing ing. , \u0301 \u00e9"
    return [
        "".join(draws.choice(odd if draws.random() < 0.4 else plain) for _ in range(draws.randrange(90)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("most_words", [10, 250_000])
def test_looking_words_up_gives_the_ids_of_the_library(vocabulary, lowercase, most_words, monkeypatch):
    monkeypatch.setattr(word_cache, "_MOST_WORDS", most_words)
    monkeypatch.setattr(word_cache, "_LONGEST_WHOLE", 50)
    library = BertWordPieceTokenizer(str(vocabulary), lowercase=lowercase)
    words = WordCache(Tokenizer.load(vocabulary, lowercase))
    for sentences in (odd_sentences(3000), ["a" * 300 + "." + "b" * 99 + "中" * 300, ""], odd_sentences(500)):
        expected = [each.ids for each in library.encode_batch(sentences, add_special_tokens=False)]
        found = words.encode(sentences)
        assert found.tokens.tolist() == [number for ids in expected for number in ids]
        assert found.lengths.tolist() == [len(ids) for ids in expected]


def test_a_tokenizer_that_looks_across_spaces_is_not_cut_at_them(tmp_path):
    ids = {entry: number for number, entry in enumerate([*SPECIAL, "new", "york", "new york"])}
    library = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Punctuation()
    library.save(str(tmp_path / "tokenizer.json"))
    words = WordCache(Tokenizer.load(tmp_path / "tokenizer.json", lowercase=True))
    assert words.encode(["new york.york", "york"]).tokens.tolist() == [7, 1, 6, 6]


def test_long_words_are_not_cut_at_characters_that_are_no_words_of_their_own(vocabulary, monkeypatch, tmp_path):
    monkeypatch.setattr(word_cache, "_LONGEST_WHOLE", 50)
    library = Tokenizer.load(vocabulary, True).library
    library.normalizer = normalizers.BertNormalizer(handle_chinese_chars=False)
    library.save(str(tmp_path / "tokenizer.json"))
    words = WordCache(Tokenizer.load(tmp_path / "tokenizer.json", lowercase=True))
    text = "中" * 120 + "a"
    assert words.encode([text]).tokens.tolist() == library.encode(text, add_special_tokens=False).ids == [1]
