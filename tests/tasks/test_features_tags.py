"""Sentences of words: tokens and labels are those of transformers' BertTokenizerFast, and no word is lost."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

from megatron_bert_tp.config.task_schema import TaskConfig
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks.examples import WordsExample
from megatron_bert_tp.tasks.features import FeatureTable, features_of
from megatron_bert_tp.tasks.labels import Labels
from megatron_bert_tp.tasks.tag_features import tag_features
from tests.sources import real_data
from tests.tasks.encoders import REAL, encoder_of, reference_of

TAGS = Labels(("O", "B-x", "I-x"))
SENTENCE = TaskConfig(name="token-classification")
DOCUMENT = TaskConfig(name="token-classification", unit="document")


def words_example(words: list[str], *, tags: list[str] | None = None, document: int = 0) -> WordsExample:
    given = None if tags is None else tuple(tags)
    return WordsExample(id="0", place="?", words=tuple(words), tags=given, document=document)


def sentences_of(name: str) -> list[WordsExample]:
    """Sentences of a file of columns, each a document of its own."""
    blocks = real_data(f"wnut17/{name}").read_text(encoding="utf-8").strip().split("\n\n")
    rows = [[line.split("\t") for line in block.splitlines() if line.strip()] for block in blocks]
    return [
        words_example([row[0] for row in each], tags=[row[-1] for row in each], document=number)
        for number, each in enumerate(rows)
        if each
    ]


def table_of(
    examples, encoder, *, longest: int, task: TaskConfig = SENTENCE, labels: Labels = TAGS
) -> FeatureTable:
    return features_of(examples, encoder, task, labels=labels, sequence_length=longest)


def rows_of(table: FeatureTable, name: str) -> list[list[int]]:
    return [values.tolist() for values in np.split(getattr(table, name), table.bounds[1:-1])]


def words_of(table: FeatureTable) -> list[list[int]]:
    """Numbers of the words of each row."""
    return [[word for word in row if word >= 0] for row in rows_of(table, "words")]


def tokens_of(words: list[str], reference) -> list[list[int]]:
    """Tokens of each word."""
    ids, of_word = (lambda row: (row["input_ids"], row.word_ids()))(reference(words, is_split_into_words=True))
    return [[token for token, word in zip(ids, of_word, strict=True) if word == n] for n in range(len(words))]


@pytest.mark.parametrize("name", ["emerging.dev.conll", "emerging.test.annotated"])
@pytest.mark.parametrize("vocabulary", REAL)
def test_sentences_of_wnut_are_those_of_the_encoding_of_split_words(vocabulary, name, tmp_path):
    examples, reference = sentences_of(name), reference_of(vocabulary)
    labels = Labels(tuple(sorted({tag for each in examples for tag in each.tags})))
    table = table_of(examples, encoder_of(vocabulary, tmp_path), longest=512, labels=labels)
    expected = reference([list(each.words) for each in examples], is_split_into_words=True)
    assert rows_of(table, "ids") == expected["input_ids"]
    assert not table.types.any()
    assert table.examples.tolist() == list(range(len(examples)))
    assert table.truncated == 0
    num_words = 0
    for number, (found, words) in enumerate(zip(rows_of(table, "labels"), rows_of(table, "words"), strict=True)):
        of_words, seen = expected.word_ids(number), set()
        for place, word in enumerate(of_words):
            is_first = word is not None and word not in seen
            assert found[place] == (labels.names.index(examples[number].tags[word]) if is_first else -100)
            assert words[place] == (num_words + word if is_first else -1)
            seen.add(word)
        num_words += len(examples[number].words)
    assert num_words > 10_000


def test_words_that_have_no_token_do_not_shift_the_labels_of_others(small):
    """Control characters are dropped by the tokenizer; a mark of the tokenizer is a word like others."""
    words = ["\u200d\u200b", "the", "\x07", "", "x y", "[MASK]", "\x07"]
    tags = ["B-x", "I-x", "B-x", "B-x", "B-x", "I-x", "B-x"]
    table = table_of([words_example(["x"], tags=["O"]), words_example(words, tags=tags)], small, longest=16)
    tokens = [small.token(token) for token in rows_of(table, "ids")[1]]
    assert tokens == ["[CLS]", "the", "x", "y", "[MASK]", "[SEP]"]
    assert rows_of(table, "labels")[1] == [-100, 2, 1, -100, 2, -100]
    assert rows_of(table, "words")[1] == [-1, 2, 5, -1, 6, -1]


def test_a_sentence_without_any_token_is_a_sample_all_the_same(small):
    table = table_of([words_example(["\x07"], tags=["O"]), words_example(["x"], tags=["O"])], small, longest=16)
    assert np.diff(table.bounds).tolist() == [2, 3]
    assert table.words.tolist() == [-1, -1, -1, 1, -1]


def test_a_sentence_that_is_too_long_is_cut_between_words(small):
    """zzz is three tokens: 6 fit into a row of 8."""
    words = ["x", "x", "zzz", "zzz", "x", "x", "x", "x", "zzz"]
    table = table_of([words_example(words, tags=["O"] * 9)], small, longest=8)
    assert words_of(table) == [[0, 1, 2], [3, 4, 5, 6], [7, 8]]
    assert table.examples.tolist() == [0, 0, 0]
    assert table.truncated == 0


def test_a_word_that_is_longer_than_a_row_keeps_its_label_and_loses_its_end(small):
    words = ["x", "z" * 9, "x", "z" * 7]
    table = table_of([words_example(words, tags=["O", "B-x", "O", "B-x"])], small, longest=8)
    assert words_of(table) == [[0], [1], [2], [3]]
    assert [len(row) for row in rows_of(table, "ids")] == [3, 8, 3, 8]
    assert table.truncated == 2


def test_a_document_is_split_between_sentences(small):
    """Six tokens fit: 3 + 2, 4, then 7, which is cut and whose end takes the 2 that follow; another document."""
    lengths = [(3, 0), (2, 0), (4, 0), (7, 0), (2, 0), (1, 1), (2, 1)]
    examples = [words_example(["x"] * length, tags=["O"] * length, document=n) for length, n in lengths]
    table = table_of(examples, small, longest=8, task=DOCUMENT)
    assert (np.diff(table.bounds) - 2).tolist() == [5, 4, 6, 3, 3]
    assert table.examples.tolist() == [0, 2, 3, 3, 5]
    assert [word for word in table.words.tolist() if word >= 0] == list(range(21))


def test_a_document_that_fits_is_one_sample_and_sentences_are_not_joined_elsewhere(small):
    examples = [words_example(["x", "the"], document=0), words_example(["\x07"]), words_example(["x"])]
    assert table_of(examples, small, longest=8, task=DOCUMENT).examples.tolist() == [0]
    assert table_of(examples, small, longest=8).examples.tolist() == [0, 1, 2]
    assert table_of(examples, small, longest=8).labels is None


@pytest.mark.parametrize("task", [SENTENCE, DOCUMENT], ids=["sentence", "document"])
@pytest.mark.parametrize("longest", [8, 13, 64])
def test_every_word_with_a_token_stands_in_one_sample_whole(small, task, longest):
    draws, reference = np.random.default_rng(longest), reference_of("uncased")
    kinds = ["x", "zz", "the", "\x07", "qqqq", "e\u0301", "東京", "z" * 7, "z" * 6, "don't"]
    examples = [
        words_example([kinds[k] for k in draws.integers(0, len(kinds), draws.integers(1, 40))], document=n // 5)
        for n in range(200)
    ]
    table = table_of(examples, small, longest=longest, task=task)
    tokens = [word for each in examples for word in tokens_of(list(each.words), reference)]
    room = longest - 2
    present = [number for number, word in enumerate(tokens) if word]
    assert [word for word in table.words.tolist() if word >= 0] == present
    inner = [row[1:-1] for row in rows_of(table, "ids")]
    assert list(chain.from_iterable(inner)) == [token for word in tokens for token in word[:room]]
    assert all(len(row) <= room for row in inner)
    for row, words in zip(inner, rows_of(table, "words"), strict=True):
        assert not row or words[1] >= 0  # no sample begins within a word
    first_words = np.cumsum([0, *(len(each.words) for each in examples)])
    for example, words in zip(table.examples.tolist(), rows_of(table, "words"), strict=True):
        inside = [word for word in words if word >= 0]
        if inside:
            assert first_words[example] <= inside[0] < first_words[example + 1]


def test_a_tag_outside_of_the_set_is_told_with_its_own_line(small):
    words = WordsExample(id="0", place="a:b/dev.conll:7", words=("x", "y", "z"), tags=("O", "O", "B-hero"))
    for place, told in (("a:b/dev.conll:7", "a:b/dev.conll:9: "), ("a:b/dev, row 7", "a:b/dev, row 7: ")):
        with pytest.raises(DataError) as caught:
            tag_features(
                [replace(words, place=place)], small, labels=Labels(("O", "B-x")), longest=16, unit="sentence"
            )
        assert str(caught.value).startswith(f"{told}the label 'B-hero' is none")
