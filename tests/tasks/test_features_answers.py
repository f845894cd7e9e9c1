"""Windows of SQuAD are those of transformers' BertTokenizerFast, their labels those of its example run_qa.py."""

import json
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from megatron_bert_tp.config.task_schema import TaskConfig
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks.examples import UNKNOWN_PLACE, Answer, AnswerExample
from megatron_bert_tp.tasks.features import FeatureTable, features_of
from tests.prediction.texts import LONG, TEXTS
from tests.sources import real_data
from tests.tasks.encoders import TINY, encoder_of, reference_of

DEV, DEV_2, TRAIN = "xquad.en.json", "dev-v2.0.first1050.json", "train-v1.1.first4370.json"
SIZES = [(384, 128), (128, 32), (80, 7)]


@pytest.fixture(scope="module", params=["bert uncased", "bert cased"])
def vocabulary(request) -> str:
    return request.param


def examples_of(name: str) -> list[AnswerExample]:
    content = json.loads(real_data(f"squad/{name}").read_text(encoding="utf-8"))
    return [
        example("?", question["question"], paragraph["context"], answers=question["answers"])
        for article in content["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def example(place: str, question: str, context: str, *, answers=(), is_labelled: bool = True) -> AnswerExample:
    found = tuple(Answer(answer["text"], answer["answer_start"]) for answer in answers)
    return AnswerExample(
        id="0", place=place, question=question, context=context, answers=found, is_labelled=is_labelled
    )


def at(context: str, text: str) -> list[dict[str, object]]:
    return [{"text": text, "answer_start": context.index(text)}]


def table_of(examples, encoder, *, longest: int, overlap: int) -> FeatureTable:
    task = TaskConfig(name="squad", overlap=overlap)
    return features_of(examples, encoder, task, labels=None, sequence_length=longest)


def windows_of(table: FeatureTable) -> Iterator[dict[str, object]]:
    cuts = table.bounds[1:-1]
    names = ("ids", "types", "spans")
    parts = zip(*(np.split(getattr(table, name), cuts) for name in names), strict=True)
    for number, values in enumerate(parts):
        label = None if table.labels is None else tuple(table.labels[number].tolist())
        window = dict(zip(names, (value.tolist() for value in values), strict=True))
        yield {"example": int(table.examples[number]), "label": label, **window}


def reference_windows(reference, examples, *, longest: int, overlap: int):
    """The call of run_qa.py."""
    return reference(
        [each.question.lstrip() for each in examples],
        [each.context for each in examples],
        truncation="only_second",
        max_length=longest,
        stride=overlap,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def label_by_rule(spans: list[list[int]], answers: tuple[Answer, ...]) -> tuple[int, int]:
    """The start is the last token of the context that begins at or before the answer's first character, the end
    the first one that ends at or behind its last; and [CLS] for both where the window does not hold all of it."""
    inside = [place for place, (first, _) in enumerate(spans) if first >= 0]
    if not answers:
        return 0, 0
    first, end = answers[0].start, answers[0].start + len(answers[0].text)
    if not (spans[inside[0]][0] <= first and end <= spans[inside[-1]][1]):
        return 0, 0
    return (
        max(place for place in inside if spans[place][0] <= first),
        min(place for place in inside if spans[place][1] >= end),
    )


@pytest.mark.parametrize(
    ("name", "longest", "overlap"),
    [(name, *size) for name in (DEV, DEV_2) for size in SIZES] + [(TRAIN, 384, 128)],
)
def test_windows_of_squad_are_those_of_run_qa(encoder, vocabulary, name, longest, overlap):
    examples = examples_of(name)
    table = table_of(examples, encoder, longest=longest, overlap=overlap)
    assert table.num_samples >= len(examples) > 1000
    assert_windows_of_run_qa(table, examples, reference_of(vocabulary), longest=longest, overlap=overlap)
    # Of the questions with an answer, hardly any is cut by all its windows.
    assert np.count_nonzero(table.labels[:, 1]) >= 0.95 * sum(bool(each.answers) for each in examples)


@pytest.mark.parametrize(("longest", "overlap"), [(512, 128), (40, 16), (40, 1)])
@pytest.mark.parametrize("vocabulary", TINY)
def test_windows_of_made_up_contexts_are_those_of_run_qa(vocabulary, longest, overlap, tmp_path):
    questions = [text for text in TEXTS if len(text) < 20] + ["the river?", ""]
    examples = [
        example("?", question, context, answers=[{"text": context[first : first + 12], "answer_start": first}])
        for context in (LONG, *TEXTS)
        for question in questions
        for first in range(0, len(context) - 12, 37)
    ]
    table = table_of(examples, encoder_of(vocabulary, tmp_path), longest=longest, overlap=overlap)
    assert table.num_samples >= len(examples) > 100
    assert_windows_of_run_qa(table, examples, reference_of(vocabulary), longest=longest, overlap=overlap)


def assert_windows_of_run_qa(table: FeatureTable, examples, reference, *, longest: int, overlap: int) -> None:
    expected = reference_windows(reference, examples, longest=longest, overlap=overlap)
    assert table.num_samples == len(expected["input_ids"])
    assert table.truncated == 0
    for number, found in enumerate(windows_of(table)):
        places = zip(expected["offset_mapping"][number], expected.sequence_ids(number), strict=True)
        spans = [list(span) if segment == 1 else [-1, -1] for span, segment in places]
        assert found["ids"] == expected["input_ids"][number]
        assert found["types"] == expected["token_type_ids"][number]
        assert found["example"] == expected["overflow_to_sample_mapping"][number]
        assert found["spans"] == spans
        assert found["label"] == label_by_rule(spans, examples[found["example"]].answers)


@pytest.mark.parametrize(("longest", "overlap"), SIZES)
def test_labelled_tokens_of_squad_hold_the_answer_and_little_more(encoder, longest, overlap):
    examples = examples_of(DEV)
    table = table_of(examples, encoder, longest=longest, overlap=overlap)
    num_exact = num_answered = 0
    for found in windows_of(table):
        if found["label"] == (0, 0):
            continue
        each, (start, end) = examples[found["example"]], found["label"]
        text = each.context[found["spans"][start][0] : found["spans"][end][1]]
        assert each.answers[0].text in text
        num_exact, num_answered = num_exact + (text == each.answers[0].text), num_answered + 1
    assert num_exact > 0.98 * num_answered  # the rest are parts of what the tokenizer takes for one word


def test_an_answer_in_the_last_token_of_a_window_is_found_there(small):
    context = "was found in the river"
    (found,) = windows_of(
        table_of([example("?", "x", context, answers=at(context, "river"))], small, longest=32, overlap=4)
    )
    assert found["label"] == (len(found["ids"]) - 2,) * 2
    assert found["spans"][found["label"][0]] == [17, 22]


def test_only_windows_that_hold_all_of_the_answer_are_labelled_with_it(small):
    context = "the river of the school " * 4
    each = example("?", "x", context, answers=[{"text": "river of the", "answer_start": 4 + 24}])
    found = list(windows_of(table_of([each], small, longest=10, overlap=3)))  # [CLS] x [SEP] + 6 + [SEP]
    # The windows begin with the words 0, 3, 6, 9, 12 and 15; the words 6, 7 and 8 are the answer.
    starts = [window["spans"][3][0] for window in found]
    assert [context[:start].count(" ") for start in starts] == [0, 3, 6, 9, 12, 15]
    assert [window["label"] for window in found] == [(0, 0), (6, 8), (3, 5), (0, 0), (0, 0), (0, 0)]


def test_without_an_answer_the_label_is_cls_and_without_labels_there_is_none(small):
    for is_labelled, expected in ((True, [[0, 0]]), (False, None)):
        each = example("?", "the school?", "the river", is_labelled=is_labelled)
        labels = table_of([each], small, longest=32, overlap=4).labels
        assert (labels if labels is None else labels.tolist()) == expected


def test_the_label_is_the_first_answer_with_a_place_and_ignored_where_none_has_one(small):
    context = "the river of the school"
    lost = {"text": "river", "answer_start": UNKNOWN_PLACE}
    found = {"text": "school", "answer_start": context.index("school")}
    examples = [
        example("?", "x", context, answers=each) for each in ([lost, found], [found], [lost], [lost, lost], [])
    ]
    labels = table_of(examples, small, longest=32, overlap=4).labels.tolist()
    # [CLS] x [SEP] and four words of the context come before.
    assert labels == [[7, 7], [7, 7], [-100, -100], [-100, -100], [0, 0]]
    windows = table_of(examples[2:3], small, longest=8, overlap=1)
    assert windows.labels.tolist() == [[-100, -100]] * windows.num_samples
    assert windows.num_samples > 1


def test_blanks_before_a_question_are_dropped(small):
    tables = [
        table_of([example("?", blanks + "the school?", "in London")], small, longest=32, overlap=4)
        for blanks in ("", " \t \u00a0" * 50)
    ]
    assert tables[0].ids.tolist() == tables[1].ids.tolist()


def test_an_overlap_shrinks_where_the_question_leaves_less_room(small):
    """8 tokens of the context fit beside the question: the overlap is 4 then."""
    each = example("?", "x " * 5, "the river of London " * 5)
    found = list(windows_of(table_of([each], small, longest=16, overlap=8)))
    spans = [[span for span in window["spans"] if span[0] >= 0] for window in found]
    assert [len(each) for each in spans] == [8, 8, 8, 8]
    assert all(one[4:] == other[:4] for one, other in pairwise(spans))


def test_a_question_that_leaves_no_room_is_refused_with_its_place(small):
    examples = [example("train.json:q1", "x", "x"), example("train.json:q2", "x " * 14, "x")]
    with pytest.raises(DataError, match=r"^train\.json:q2: the question has 14 tokens.* among 16; shorten it"):
        table_of(examples, small, longest=16, overlap=4)


def test_a_context_without_a_token_has_one_window_without_an_answer(small):
    (found,) = windows_of(table_of([example("?", "x", "\x07")], small, longest=16, overlap=4))
    assert found["label"] == (0, 0)
    assert set(map(tuple, found["spans"])) == {(-1, -1)}
