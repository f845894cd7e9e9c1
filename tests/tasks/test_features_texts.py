"""Rows of texts, pairs and choices are those of transformers' BertTokenizerFast."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_bert_tp.config.task_schema import TaskConfig
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks.examples import ChoiceExample, TextExample
from megatron_bert_tp.tasks.features import FeatureTable, features_of
from megatron_bert_tp.tasks.labels import Labels
from tests.prediction.texts import LONG, PAIRS, TEXTS
from tests.sources import real_data
from tests.tasks.encoders import ALL, REAL, encoder_of, reference_of

YES_NO = Labels(("no", "yes"))
COLUMNS = {"MRPC": (3, 4), "RTE": (1, 2), "STS-B": (7, 8)}


@pytest.fixture(scope="module", params=ALL)
def vocabulary(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def reference(vocabulary):
    return reference_of(vocabulary)


def text_example(number: int, text: str, pair: str | None = None, label=None) -> TextExample:
    return TextExample(id=str(number), place=f"made.tsv:{number + 1}", text=text, pair=pair, label=label)


def pairs_of(task: str) -> list[tuple[str, str]]:
    """The pairs of a part of GLUE, cut at tabs and nothing else."""
    lines = real_data(f"glue/{task}/dev.tsv").read_text(encoding="utf-8-sig").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    first, second = COLUMNS[task]
    return [(row[first], row[second]) for row in rows]


def rows_of(table: FeatureTable) -> list[tuple[list[int], list[int]]]:
    """Ids and types of each row."""
    cuts = table.bounds[1:-1]
    return [
        (ids.tolist(), types.tolist())
        for ids, types in zip(np.split(table.ids, cuts), np.split(table.types, cuts), strict=True)
    ]


def expected_rows(reference, texts, longest) -> list[tuple[list[int], list[int]]]:
    """Each text or pair by itself where some are texts, else all pairs at once."""
    kinds = {len(text) for text in texts}
    calls = [zip(*texts, strict=True)] if len(kinds) == 1 else [[[part] for part in text] for text in texts]
    made = [reference(*map(list, call), truncation="longest_first", max_length=longest) for call in calls]
    return [row for one in made for row in zip(one["input_ids"], one["token_type_ids"], strict=True)]


def whole_lengths(reference, pairs) -> list[int]:
    return [len(ids) for ids in reference(*map(list, zip(*pairs, strict=True)), verbose=False)["input_ids"]]


@pytest.mark.parametrize("longest", [128, 31, 24])
@pytest.mark.parametrize("vocabulary", REAL, indirect=True)
@pytest.mark.parametrize("task", sorted(COLUMNS))
def test_pairs_of_glue_are_those_of_the_pair_encoding(encoder, reference, task, longest):
    pairs = pairs_of(task)
    examples = [text_example(number, *pair, label=0.5) for number, pair in enumerate(pairs)]
    table = features_of(examples, encoder, TaskConfig(name="sts-b"), labels=None, sequence_length=longest)
    assert rows_of(table) == expected_rows(reference, pairs, longest)
    assert table.truncated == sum(length > longest for length in whole_lengths(reference, pairs))
    assert table.num_samples == len(pairs) > 250


@pytest.mark.parametrize("longest", [512, 25, 24])
def test_texts_and_pairs_of_all_kinds_are_those_of_the_encoding(encoder, reference, longest):
    texts = [(text,) for text in TEXTS] + PAIRS + [(LONG,), (LONG, LONG), ("",), ("[MASK] x [SEP]", "\x07")]
    examples = [text_example(number, *text) for number, text in enumerate(texts)]
    table = features_of(examples, encoder, TaskConfig(name="rte"), labels=YES_NO, sequence_length=longest)
    assert rows_of(table) == expected_rows(reference, texts, longest)
    assert table.lengths.max() <= longest
    assert table.labels is None


def test_every_cut_of_short_pairs_is_that_of_the_encoding(small):
    """All lengths of both texts, so that either is cut, or both, or none."""
    texts = [("x " * first, "y " * second) for first in range(1, 12) for second in range(1, 12)]
    examples = [text_example(number, *text) for number, text in enumerate(texts)]
    for longest in (8, 9, 13):
        table = features_of(examples, small, TaskConfig(name="rte"), labels=None, sequence_length=longest)
        assert rows_of(table) == expected_rows(reference_of("uncased"), texts, longest)


def test_a_tokenizer_that_allows_fewer_tokens_than_the_settings_has_its_way(tmp_path):
    encoder = encoder_of("uncased", tmp_path, longest=20)
    table = features_of(
        [text_example(0, LONG)], encoder, TaskConfig(name="cola"), labels=YES_NO, sequence_length=128
    )
    assert table.lengths.tolist() == [[20]]


def test_examples_stay_in_their_order_over_all_portions(small):
    """5000 are more than are encoded at once."""
    texts = [f"{number} was {number % 7}" for number in range(5000)]
    examples = [text_example(n, text, label=str(n % 2)) for n, text in enumerate(texts)]
    labels = Labels(("0", "1"))
    table = features_of(examples, small, TaskConfig(name="classification"), labels=labels, sequence_length=8)
    assert rows_of(table) == expected_rows(reference_of("uncased"), [(text,) for text in texts], 8)
    assert table.examples.tolist() == list(range(5000))
    assert table.labels is not None
    assert table.labels.tolist() == [0, 1] * 2500


def test_labels_of_each_kind_are_numbers_of_their_own_type(small):
    def labels_of(task: str, given: list[object], names: Labels | None) -> np.ndarray | None:
        examples = [text_example(number, "x", label=label) for number, label in enumerate(given)]
        return features_of(examples, small, TaskConfig(name=task), labels=names, sequence_length=8).labels

    classes = labels_of("classification", ["yes", "no", "yes"], YES_NO)
    assert (classes.dtype, classes.tolist()) == (np.int64, [1, 0, 1])
    names = Labels(("a", "b", "c"))
    many = labels_of("multi-label", [("c", "a"), (), ("b",)], names)
    assert (many.dtype, many.tolist()) == (np.float32, [[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    values = labels_of("regression", [0.1, -2.5], None)
    assert (values.dtype, values.tolist()) == (np.float64, [0.1, -2.5])
    assert labels_of("classification", ["yes", None], YES_NO) is None


def test_a_label_outside_the_set_is_told_with_its_place(small):
    examples = [text_example(0, "x", label="yes"), text_example(1, "x", label="maybe")]
    with pytest.raises(DataError, match=r"^made\.tsv:2: .*'maybe'"):
        features_of(examples, small, TaskConfig(name="classification"), labels=YES_NO, sequence_length=8)


def test_pairs_for_a_model_with_one_token_type_are_refused(tmp_path):
    encoder = encoder_of("uncased", tmp_path, num_types=1)
    task = TaskConfig(name="rte")
    alone = features_of([text_example(0, "x")], encoder, task, labels=None, sequence_length=8)
    assert alone.types.max() == 0
    with pytest.raises(DataError, match="one token type only"):
        features_of([text_example(0, "x", "y")], encoder, task, labels=None, sequence_length=8)


def choice_examples() -> list[ChoiceExample]:
    """Questions of the real folder, each option behind the question in front of the article."""
    paths = sorted(Path(real_data("race_layout/dev/middle")).glob("*.txt"))[:60]
    examples = []
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        for number, (question, options, answer) in enumerate(
            zip(content["questions"], content["options"], content["answers"], strict=True)
        ):
            pairs = tuple((f"{question} {option}", content["article"]) for option in options)
            label = "ABCD".index(answer)
            examples.append(ChoiceExample(id=f"{path}-{number}", place=str(path), pairs=pairs, label=label))
    return examples


@pytest.mark.parametrize("longest", [256, 40])
def test_each_choice_is_a_row_of_its_own(encoder, reference, longest):
    examples = choice_examples()
    table = features_of(examples, encoder, TaskConfig(name="race"), labels=None, sequence_length=longest)
    pairs = [pair for example in examples for pair in example.pairs]
    assert rows_of(table) == expected_rows(reference, pairs, longest)
    assert (table.rows_per_sample, table.num_samples) == (3, len(examples))
    assert table.lengths.shape == (len(examples), 3)
    assert table.labels is not None
    assert table.labels.tolist() == [example.label for example in examples]
    whole = np.reshape(whole_lengths(reference, pairs), (-1, 3))
    assert table.truncated == (whole.max(axis=1) > longest).sum()


def test_a_part_without_any_example_has_an_empty_table(small):
    for name in ("sst-2", "multiple-choice", "squad", "token-classification"):
        table = features_of([], small, TaskConfig(name=name), labels=YES_NO, sequence_length=16)
        assert (table.num_samples, len(table.ids), table.bounds.tolist()) == (0, 0, [0])


def test_choices_of_which_one_has_no_label_have_none(encoder):
    first, second, third = choice_examples()[:3]
    given = [first, replace(second, label=None), third]
    table = features_of(given, encoder, TaskConfig(name="race"), labels=None, sequence_length=40)
    assert (table.labels, table.num_samples) == (None, 3)
