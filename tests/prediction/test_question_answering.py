"""Answers are those of the pipeline of transformers 4.57 (golden: transformers 5 has it no more)."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_bert_tp import MegatronBertConfig, MegatronBertForQuestionAnswering
from megatron_bert_tp.prediction.question_answering import Span, candidates, merged, whole_words
from megatron_bert_tp.text.encoder import Row, windows
from tests.prediction.answering import QUESTIONS, SIZES, answering_weight
from tests.prediction.directories import add_tokenizer, predict
from tests.prediction.texts import LONG, VOCABULARIES

GOLDEN = json.loads((Path(__file__).parent / "question_answering_4_57.json").read_text(encoding="utf-8"))
OPTIONS = {"top_k": "top"}


@pytest.fixture(scope="module", params=sorted(VOCABULARIES))
def vocabulary(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def directory(vocabulary, vocabulary_file, tmp_path_factory) -> Path:
    """The model of the golden answers, as we write it."""
    folder = tmp_path_factory.mktemp("answering")
    model = MegatronBertForQuestionAnswering(MegatronBertConfig(vocab_size=len(VOCABULARIES[vocabulary]), **SIZES))
    state = model.state_dict()
    model.load_state_dict({name: answering_weight(name, tuple(value.shape)) for name, value in state.items()})
    model.save_pretrained(folder)
    add_tokenizer(folder, vocabulary_file(vocabulary), lowercase=vocabulary == "uncased", longest=512)
    return folder


def assert_same_answer(found, expected) -> None:
    assert {key: found[key] for key in ("answer", "start", "end")} == {
        key: expected[key] for key in ("answer", "start", "end")
    }
    # Sums over up to 60 windows reach 8, of float32 there.
    assert found["score"] == pytest.approx(expected["score"], abs=1e-5, rel=2e-6)


def test_answers_are_those_of_the_pipeline(directory, vocabulary):
    for (question, context, given), expected in zip(QUESTIONS, GOLDEN["answers"][vocabulary], strict=True):
        options = {OPTIONS.get(name, name): value for name, value in given.items()}
        line = {"question": question, "context": context}
        (record,) = predict(directory, "question-answering", [line], **options)
        assert context[record["start"] : record["end"]] == record["answer"]
        if isinstance(expected, list):
            for one, other in zip(record["answers"], expected, strict=True):
                assert_same_answer(one, other)
        assert_same_answer(record, expected[0] if isinstance(expected, list) else expected)


def test_questions_of_all_lengths_in_one_batch_are_answered_alike(directory, vocabulary):
    told = list(zip(QUESTIONS, GOLDEN["answers"][vocabulary], strict=True))
    plain = [(question, context, answer) for (question, context, options), answer in told if not options]
    lines = [{"question": question, "context": context} for question, context, _ in plain]
    found = predict(directory, "question-answering", lines, batch_size=64)
    for record, (_, _, answer) in zip(found, plain, strict=True):
        assert_same_answer(record, answer)


def test_a_question_that_leaves_little_room_is_answered_and_one_that_leaves_none_is_refused(directory):
    asked = [{"question": "find " * times, "context": LONG} for times in (300, 400)]
    answered, refused = predict(directory, "question-answering", asked)
    assert LONG[answered["start"] : answered["end"]] == answered["answer"] != ""
    assert refused == {
        "line": 2,
        "error": "the question has 400 tokens and leaves no room for the context among 384; shorten it",
    }


@pytest.mark.parametrize(
    ("num_tokens", "size", "overlap", "starts"),
    [(5, 5, 2, [0]), (6, 5, 2, [0, 3]), (8, 5, 2, [0, 3]), (9, 5, 2, [0, 3, 6]), (4, 1, 0, [0, 1, 2, 3])],
)
def test_windows_by_hand(num_tokens, size, overlap, starts):
    found = windows(num_tokens, size=size, overlap=overlap)
    assert [window.start for window in found] == starts
    assert set().union(*found) == set(range(num_tokens))
    assert max(map(len, found)) <= size


# [CLS] q [SEP] ab ##c d [SEP], the words of the context being "abc" and "d".
ROW = Row(
    ids=(2, 7, 3, 8, 9, 10, 3),
    types=(0, 0, 0, 1, 1, 1, 1),
    offsets=((0, 0), (0, 1), (0, 0), (0, 2), (2, 3), (4, 5), (0, 0)),
    segments=(None, 0, None, 1, 1, 1, None),
    words=(None, 0, None, 0, 0, 1, None),
)


def test_a_span_ends_at_whole_words():
    assert whole_words(ROW, 4, 4) == (0, 3)
    assert whole_words(ROW, 4, 5) == (0, 5)
    assert whole_words(ROW.taken([0, 1, 2, 4, 5, 6]), 3, 3) == (2, 3), "of a cut word, what the window shows"


def test_candidates_by_hand():
    logits = np.log(np.array([[4, 5, 5, 1, 2, 1, 9], [2, 5, 5, 1, 1, 4, 9]], dtype=np.float32)).T
    first, second, *_ = candidates(ROW, logits, cls_id=2, top=9, longest=3)
    # Starts 1/8, 2/8, 1/8 and ends 1/8, 1/8, 4/8 of the three tokens of the context; [CLS] has the rest.
    assert first == Span(0, 5, pytest.approx(2 / 8 * 4 / 8))
    assert second.score == pytest.approx(1 / 8 * 4 / 8)
    spans = candidates(ROW, logits, cls_id=2, top=20, longest=1)
    assert {(span.start, span.end) for span in spans} == {(0, 3), (4, 5)}


def test_scores_of_the_same_words_are_added():
    context = "The end, the END"
    spans = [Span(4, 7, 0.25), Span(0, 3, 0.5), Span(13, 16, 0.375)]
    assert merged(spans, context) == [Span(4, 7, 0.625), Span(0, 3, 0.5)]
