"""Answers are those of the reference post-processing of transformers (golden), and of sums by hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_bert_tp.config.task_schema import TaskConfig
from megatron_bert_tp.tasks.answers import NO_SPAN, Answers, Limits, decoded
from megatron_bert_tp.tasks.examples import Answer, AnswerExample
from megatron_bert_tp.tasks.feature_table import FeatureTable, bounds_of
from megatron_bert_tp.tasks.features import features_of
from megatron_bert_tp.tasks.scoring import Scored, score
from megatron_bert_tp.tasks.task import Kind
from tests.sources import real_data
from tests.tasks.answering import MODES, Mode, digest, logits_of, questions_of
from tests.tasks.encoders import encoder_of

GOLDEN = json.loads((Path(__file__).parent / "answers_4_57.json").read_text(encoding="utf-8"))["modes"]
MADE = [name for name, mode in MODES.items() if not mode.file]
REAL = [name for name, mode in MODES.items() if mode.file]
OURS = {
    "exact": "exact_match",
    "f1": "f1",
    "HasAns_exact": "has_answer_exact_match",
    "HasAns_f1": "has_answer_f1",
    "NoAns_exact": "no_answer_exact_match",
    "NoAns_f1": "no_answer_f1",
    "best_exact": "best_exact_match",
    "best_f1": "best_f1",
}


def scored(name: str, folder: Path) -> Scored:
    """The questions of a mode by our features, with its logits."""
    mode = MODES[name]
    questions = questions_of(mode, real_data("squad") if mode.file else folder)
    examples = tuple(
        AnswerExample(
            id=each.id,
            place="",
            question=each.question,
            context=each.context,
            answers=tuple(Answer(*answer) for answer in each.answers),
        )
        for each in questions
    )
    task = task_of(mode)
    encoder = encoder_of("bert uncased" if mode.file else "uncased", folder)
    table = features_of(examples, encoder, task, labels=None, sequence_length=mode.size)
    assert (len(table.ids), len(table.bounds) - 1) == (GOLDEN[name]["tokens"], GOLDEN[name]["windows"])
    return score(task, examples, table, logits_for(table, questions), labels=None)


def task_of(mode: Mode) -> TaskConfig:
    return TaskConfig(
        name="squad",
        n_best=mode.n_best,
        longest_answer=mode.longest,
        overlap=mode.overlap,
        unanswerable=mode.may_be_none,
    )


def logits_for(table, questions) -> np.ndarray:
    parts = np.split(table.spans, table.bounds[1:-1])
    return logits_of(list(zip(table.examples.tolist(), parts, strict=True)), questions)


def files_of(found: Scored) -> dict[str, dict]:
    return {name.removesuffix(".json"): json.loads(content) for name, content in found.submissions.items()}


def assert_metrics(found: Scored, name: str) -> None:
    told = GOLDEN[name]["scores"]
    names = OURS if MODES[name].may_be_none else {"exact": "exact_match", "f1": "f1"}
    for other, own in names.items():
        # Two orders of the same sum of at most 1190 terms.
        assert found.metrics[own] == pytest.approx(told[other] / 100, abs=1e-12)
    thresholds = {"best_exact_thresh": "best_exact_match_threshold", "best_f1_thresh": "best_threshold"}
    for other, own in thresholds.items():
        if told.get(other):  # 0 is also what the reference says for "below all"
            assert found.metrics[own] == told[other]


@pytest.mark.parametrize("name", MADE)
def test_answers_are_those_of_the_reference(name, tmp_path):
    found = scored(name, tmp_path)
    files, expected = files_of(found), GOLDEN[name]["questions"]
    assert files.keys() == expected.keys()
    assert files["predictions"] == expected["predictions"]
    assert files.get("null_odds") == expected.get("null_odds")
    for key, candidates in expected["nbest_predictions"].items():
        ours = files["nbest_predictions"][key]
        for fact in ("text", "start_logit", "end_logit"):
            assert [each[fact] for each in ours] == [each[fact] for each in candidates]
        # The reference takes the softmax in float32.
        shares = [each["probability"] for each in candidates]
        assert [each["probability"] for each in ours] == pytest.approx(shares, rel=1e-5, abs=1e-7)
    assert_metrics(found, name)


@pytest.mark.parametrize("name", REAL)
def test_answers_to_squad_are_those_of_the_reference(name, tmp_path):
    found = scored(name, tmp_path)
    files = files_of(found)
    odds = files.get("null_odds", {})
    digests = {
        key: digest(said, files["nbest_predictions"][key], odds.get(key))
        for key, said in files["predictions"].items()
    }
    expected = dict(zip(digests, GOLDEN[name]["digests"].split(), strict=True))
    assert {key for key, each in digests.items() if each != expected[key]} == set()
    assert_metrics(found, name)


# By hand: a context of four words, "ab cd ef gh", in rows of [CLS] ? [SEP] ... [SEP].

CONTEXT = "ab cd ef gh"
WORDS = [(0, 2), (3, 5), (6, 8), (9, 11)]
NOWHERE = (-1, -1)


def windows_of(*parts: list[tuple[int, int]]) -> FeatureTable:
    rows = [[NOWHERE, NOWHERE, NOWHERE, *part, NOWHERE] for part in parts]
    spans = np.array([span for row in rows for span in row], dtype=np.int32)
    return FeatureTable(
        kind=Kind.ANSWER,
        ids=np.zeros(len(spans), dtype=np.int32),
        types=np.zeros(len(spans), dtype=np.uint8),
        bounds=bounds_of(np.array([len(row) for row in rows])),
        examples=np.zeros(len(rows), dtype=np.int64),
        spans=spans,
    )


def answers_of(table: FeatureTable, starts: list[float], ends: list[float], limits: Limits) -> Answers:
    logits = np.array([starts, ends], dtype=np.float32).T
    example = AnswerExample(id="q", place="", question="?", context=CONTEXT)
    (found,) = decoded([example], table, logits, limits)
    return found


def texts(found: Answers) -> list[str]:
    return [candidate.text for candidate in found.candidates]


def test_candidates_are_ranked_by_the_sum_of_their_logits():
    #              cls ?  sep ab cd ef gh sep
    found = answers_of(windows_of(WORDS), [0, 9, 0, 4, 3, 0, 0, 9], [0, 9, 0, 0, 1, 5, 0, 9], Limits(5, 30, False))
    # Of the five best starts and ends three are in no context: ab and cd are left, and cd and ef.
    assert texts(found) == ["ab cd ef", "cd ef", "ab cd", "cd"]
    assert [candidate.score for candidate in found.candidates] == [9, 8, 5, 4]
    assert (found.span.start, found.span.end) == (0, 8)
    shares = np.exp([9, 8, 5, 4]) / np.exp([9, 8, 5, 4]).sum()
    assert [candidate.probability for candidate in found.candidates] == pytest.approx(shares, rel=1e-15)
    assert found.odds is None
    assert found.said(-99.0) == found.span


def test_an_answer_has_at_most_so_many_tokens():
    starts, ends = [0, 0, 0, 4, 3, 0, 0, 0], [0, 0, 0, 0, 1, 5, 0, 0]
    assert texts(answers_of(windows_of(WORDS), starts, ends, Limits(20, 2, False)))[0] == "cd ef"
    assert texts(answers_of(windows_of(WORDS), starts, ends, Limits(20, 3, False)))[0] == "ab cd ef"


def test_windows_must_agree_that_there_is_no_answer():
    table = windows_of(WORDS[:2], WORDS[2:])
    # No answer has 6 in the first window and 3 in the second; cd has 4, gh 5.
    starts = [3, 0, 0, 0, 2, 0, 2, 0, 0, 0, 3, 0]
    ends = [3, 0, 0, 0, 2, 0, 1, 0, 0, 0, 2, 0]
    found = answers_of(table, starts, ends, Limits(2, 30, True))
    assert texts(found)[:2] == ["gh", "cd"]
    assert found.span.text == "gh"
    assert found.odds == 3 - 5
    assert texts(found)[-1] == "", "no answer is kept, though two others are better"
    assert found.null is not None
    assert found.null.score == 3
    assert (found.said(-2.0).text, found.said(-2.5).text) == ("gh", "")
    assert found.said(-2.5).start is None


def test_windows_may_come_in_any_order_among_those_of_other_examples():
    table = replace(windows_of(WORDS[:2], WORDS[2:], WORDS[:2]), examples=np.array([1, 1, 0]))
    logits = np.zeros((18, 2), dtype=np.float32)
    logits[[3, 10, 16]] = [1], [3], [2]  # ab and gh of the second example, cd of the first
    examples = [AnswerExample(id=name, place="", question="?", context=CONTEXT) for name in "pq"]
    found = decoded(examples, table, logits, Limits(9, 1, False))
    assert [each.span.text for each in found] == ["cd", "gh"]


def test_of_equal_scores_no_answer_comes_last():
    found = answers_of(windows_of(WORDS[:1]), [0, -1, -1, 0, -1], [0, -1, -1, 0, -1], Limits(1, 30, True))
    # The best start and end are [CLS] itself, so there is no span at all, and what stands in for one has 0, too.
    assert texts(found) == [NO_SPAN, ""]
    found = answers_of(windows_of(WORDS[:1]), [0, -1, -1, 0, -1], [0, -1, -1, 0, -1], Limits(2, 30, True))
    assert texts(found) == ["ab", ""]
    assert found.odds == 0
    assert found.said(0.0).text == "ab"


@pytest.mark.parametrize("may_be_none", [False, True])
def test_without_a_span_the_answer_is_that_of_the_reference(may_be_none):
    found = answers_of(
        windows_of(WORDS), [5, 0, 0, 0, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0, 0], Limits(1, 30, may_be_none)
    )
    assert texts(found) == ([NO_SPAN, ""] if may_be_none else [NO_SPAN])
    assert found.span.start is None
    assert found.odds == (10 if may_be_none else None)
