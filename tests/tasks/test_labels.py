"""Labels and their numbers."""

import time

import pytest

from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks.examples import ChoiceExample, TextExample, WordsExample
from megatron_bert_tp.tasks.labels import Labels, labels_from_names, labels_of
from megatron_bert_tp.tasks.scoring import _places_in_task
from megatron_bert_tp.tasks.task import TASKS
from tests.tasks.reading import task


def texts(*labels):
    return [
        TextExample(id=str(n), place=f"train.csv:{n + 2}", text="t", label=label) for n, label in enumerate(labels)
    ]


def words(*tags):
    return [WordsExample(id="0", place="train.conll:1", words=tuple(tags), tags=tuple(tags))]


def names(known, examples):
    found = labels_of(known, examples)
    assert found is not None
    return found.names


def test_a_number_is_the_place_among_the_names():
    labels = Labels(("no", "yes"))
    assert [labels.number(name, "") for name in ("no", "yes")] == [0, 1]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            "yess",
            "dev.csv:7: the label 'yess' is none of the labels of the task; did you mean 'yes'? there are 'no'",
        ),
        ("YES", "dev.csv:7: the label 'YES' is none of the labels of the task; did you mean 'yes'?"),
        (
            "1",
            "dev.csv:7: the label '1' is none of the labels of the task; there are 'no', 'yes'; mend the",
        ),
    ],
)
def test_a_label_outside_the_set_is_refused_with_its_place(label, message):
    with pytest.raises(DataError) as caught:
        Labels(("no", "yes")).number(label, "dev.csv:7")
    assert str(caught.value).startswith(message)


def test_the_same_number_written_in_another_way_is_told():
    with pytest.raises(DataError) as caught:
        Labels(("0", "1")).number("1.0", "dev.csv:7")
    assert "the label '1.0' is the same number as the label '1' of the task; write it in" in str(caught.value)


def test_the_settings_come_before_the_task_and_the_task_before_the_data():
    assert names(task("classification", labels=("b", "a")), texts("a", "b", "c")) == ("b", "a")
    assert names(task("sst-2"), texts("positive")) == ("negative", "positive")
    assert names(task("sst-2", labels=("positive", "negative")), None) == ("positive", "negative")
    assert names(task("classification"), texts("b", "a", "b")) == ("a", "b")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("10", "9", "-1"), ("-1", "9", "10")),
        (("10", "9", "x"), ("10", "9", "x")),
        (("1.5", "1.25"), ("1.25", "1.5")),
        (("²", "1"), ("1", "²")),
    ],
)
def test_names_are_sorted_as_numbers_where_all_are_whole(given, expected):
    assert names(task("classification"), texts(*given)) == expected


@pytest.mark.parametrize("twins", [("1", "1.0"), ("1", "01"), ("0", "-0"), ("1.50", "1.5")])
def test_one_number_in_two_ways_is_refused_with_both_places(twins):
    with pytest.raises(DataError) as caught:
        labels_of(task("classification"), texts(*twins))
    told = f"train.csv:3: the label {twins[1]!r} is the same number as {twins[0]!r} at train.csv:2;"
    assert str(caught.value).startswith(told)


def test_several_labels_of_each_example_are_all_counted():
    assert names(task("multi-label"), texts(("b",), (), ("c", "a"))) == ("a", "b", "c")


def test_tags_are_outside_then_both_of_each_type():
    known = task("token-classification")
    assert names(known, words("B-PER", "O", "B-LOC", "I-LOC")) == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    assert names(known, words("B-a-b")) == ("O", "B-a-b", "I-a-b")


@pytest.mark.parametrize("name", ["sts-b", "regression", "race", "multiple-choice", "squad"])
def test_numbers_choices_and_answers_have_no_names(name):
    assert labels_of(task(name), [ChoiceExample(id="0", place="", pairs=(), label=1)]) is None


def test_the_names_of_every_task_are_distinct():
    for name, row in TASKS.items():
        if row.labels is not None:
            assert names(task(name), None) == row.labels


def test_labels_that_nobody_says_are_asked_for():
    with pytest.raises(DataError, match=r"labels of task 'classification' are not known; set task\.labels"):
        labels_of(task("classification"), None)


@pytest.mark.parametrize(
    ("name", "examples"),
    [
        ("classification", texts("a", "a")),
        ("token-classification", words("O", "O")),
        ("multi-label", texts((), ())),
    ],
)
def test_too_few_labels_are_refused(name, examples):
    with pytest.raises(DataError, match=r"the labels are \[.*\], but a task needs [12] or more"):
        labels_of(task(name), examples)


def test_names_that_are_there_twice_are_refused():
    with pytest.raises(DataError, match="the label 'a' is there twice"):
        labels_from_names(["a", "b", "a"])
    assert labels_from_names(["b", "a"]) == Labels(("b", "a"))


def test_many_labels_take_time_by_their_number():
    """A column of numbers that was meant for a regression: 200,000 names, each once."""
    began = time.process_time()
    labels = labels_from_names(str(number) for number in range(200_000))
    assert _places_in_task("classification", labels.names)[-1] == 199_999
    assert time.process_time() - began < 5
