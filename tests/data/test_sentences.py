import random

import pytest
import sentencex

from megatron_bert_tp.data.preprocessing.languages import language_code
from megatron_bert_tp.data.preprocessing.sentences import _windowed, segment, split_sentences
from megatron_bert_tp.errors import DataError


def test_sentences_end_at_their_mark_and_at_blank_lines_but_not_after_titles():
    text = "A heading\n\nMr. Smith lives in\nthe U.S. today. He is \n 5.5 feet tall! Is he?"
    expected = ["A heading", "Mr. Smith lives in the U.S. today.", "He is 5.5 feet tall!", "Is he?"]
    assert [s.strip() for s in split_sentences(text, sentence_per_line=False)] == expected


def test_with_a_sentence_per_line_nothing_is_split_or_joined():
    assert split_sentences("One. Two.\nThree\n\n \nfour", sentence_per_line=True) == ["One. Two.", "Three", "four"]


def test_a_line_too_long_to_be_wrapped_ends_a_paragraph_and_wrapped_lines_are_joined():
    long = "word " * 50
    assert [s.strip() for s in split_sentences(f"A title\n{long}\nAn end", sentence_per_line=False)] == [
        "A title",
        long.strip(),
        "An end",
    ]
    assert split_sentences("One\ntwo\nthree.", sentence_per_line=False) == ["One two three."]


@pytest.mark.parametrize(
    ("language", "sentences"),
    [
        ("zh", ["今天天气很好。", "你去哪里\uff1f", "太好了\uff01", "我们走吧。"]),
        ("ja", ["今日はいい天気です。", "どこへ行きますか\uff1f", "はい\uff01"]),
        ("de", ["Dr. Müller sprach z.B. über Wien. ", "Gut!"]),
        ("ar", ["مرحبا بك. ", "كيف حالك؟ ", "أنا بخير!"]),
        ("hi", ["यह एक वाक्य है। ", "यह दूसरा है। ", "क्या?"]),
    ],
)
def test_each_language_ends_sentences_at_its_own_marks(language, sentences):
    assert split_sentences("".join(sentences), sentence_per_line=False, language=language) == sentences


def test_language_codes_with_regions_are_known_and_unknown_ones_get_close_ones():
    assert [language_code(code) for code in ("zh", "zh_TW", "EN-us", "fi")] == ["zh", "zh", "en", "fi"]
    hints = {"chinese": "did you mean zh", "xx": "With rules of their own", "enn": "did you mean en"}
    for wrong, hint in hints.items():
        with pytest.raises(DataError, match=f"{wrong}' is not a language code.*{hint}"):
            language_code(wrong)


@pytest.mark.parametrize("size", [30, 100, 1000])
def test_windows_lose_no_character_and_move_no_boundary_of_plain_sentences(size):
    draws = random.Random(size)
    words = ["Cats", "dogs", "ran", "far", "U.S.", "5.5", "Mr.", "x" * 120]
    text = " ".join(" ".join(draws.choices(words, k=draws.randrange(1, 9))) + " end." for _ in range(200))
    found = _windowed(text, lambda window: sentencex.segment("en", window), size)
    assert "".join(found) == text
    if size == 1000:
        assert found == sentencex.segment("en", text)


def test_splitting_takes_time_in_proportion_to_the_text():
    """400 kB of opening quotes take the library itself half a minute."""
    text = "« " * 200_000
    assert "".join(segment("fr", text)) == text
