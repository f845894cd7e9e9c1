"""Exact match and F1 as the two evaluation scripts of SQuAD define them, by hand; thresholds by trying all."""

import numpy as np
import pytest

from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks.answer_scores import (
    best_threshold,
    metrics_1_1,
    metrics_2_0,
    normalized,
    scores_1_1,
    scores_2_0,
    word_f1,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat's hat.", "cats hat"),
        ("a an the", ""),
        ("Theatre another", "theatre another"),
        ("U.S.A.", "usa"),
        ("t-h-e end", "end"),  # punctuation goes first, and leaves an article
        ("the\u2014end", "\u2014end"),  # not ASCII, so no punctuation, but the end of a word
        ("\u00a0Zürich\t1,000 ", "zürich 1000"),
    ],
)
def test_texts_are_compared_without_capitals_punctuation_articles_and_blanks(text, expected):
    assert normalized(text) == expected


@pytest.mark.parametrize(
    ("answer", "expected", "f1"),
    [
        ("red cat", "red cat", 1.0),
        ("red cat", "a big red cat", 2 * (1.0 * 2 / 3) / (1.0 + 2 / 3)),
        ("cat cat", "cat", 2 * 0.5 * 1.0 / 1.5),
        ("cat cat dog", "cat cat cat", 2 / 3),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "the", 0.0),
    ],
)
def test_f1_of_words_by_hand(answer, expected, f1):
    assert word_f1(answer, expected) == pytest.approx(f1, rel=1e-15)


def test_the_best_fitting_answer_counts():
    assert scores_1_1("The dog!", ["cat", "dog", "big dog"]) == (1.0, 1.0)
    assert scores_1_1("big dog", ["dog", "cat"]) == (0.0, 2 / 3)


def test_the_two_versions_differ_where_nothing_is_left_of_an_answer():
    assert scores_1_1("A", ["a"]) == (1.0, 0.0)
    assert scores_2_0("A", ["a"]) == (1.0, 1.0)
    assert scores_2_0("", []) == (1.0, 1.0)
    assert scores_2_0("The.", []) == (1.0, 1.0)
    assert scores_2_0("dog", []) == (0.0, 0.0)
    assert scores_2_0("", ["dog"]) == (0.0, 0.0)
    assert scores_2_0("", ["the", "dog"]) == (0.0, 0.0)


def test_a_question_without_an_answer_is_refused_by_the_version_that_does_not_know_any():
    with pytest.raises(DataError, match=r"SQuAD 1\.1 does not measure; set task\.unanswerable=true"):
        metrics_1_1(["cat", "dog"], [["cat"], []])


def mean_at(threshold: float, scores, is_answerable, odds) -> float:
    """Mean score where what has larger odds is not answered."""
    total = 0.0
    for value, can_be, odd in zip(scores, is_answerable, odds, strict=True):
        total += (0.0 if can_be else 1.0) if odd > threshold else value if can_be else 0.0
    return total / len(scores)


@pytest.mark.parametrize("seed", range(20))
def test_no_threshold_is_better_than_the_best(seed):
    draws = np.random.default_rng(seed)
    num = int(draws.integers(1, 40))
    # Eighths, so that sums are exact in any order; odds of few values, so that many are equal.
    scores, odds = draws.integers(0, 9, num) / 8, draws.integers(-3, 4, num) / 2
    is_answerable = draws.random(num) < draws.random()
    found = best_threshold(scores, is_answerable, odds)
    tried = [mean_at(each, scores, is_answerable, odds) for each in (-9.0, *sorted(set(odds)))]
    assert found.score == max(tried) == mean_at(found.odds, scores, is_answerable, odds)


def test_where_no_answer_is_best_the_threshold_is_below_all_odds():
    found = best_threshold(np.array([0.0, 0.5]), np.array([False, True]), np.array([-5.0, -4.0]))
    assert found.score == 0.5
    assert -5.1 < found.odds < -5.0


def test_metrics_by_hand():
    expected = [["cat"], ["red dog"], [], []]
    spans, odds = ["cat", "dog", "x", "y"], np.array([-3.0, 1.0, -2.0, 4.0])
    found = metrics_2_0(["cat", "", "x", ""], expected, spans=spans, odds=odds)
    assert found == {
        "exact_match": 2 / 4,
        "has_answer_exact_match": 1 / 2,
        "no_answer_exact_match": 1 / 2,
        "f1": 2 / 4,
        "has_answer_f1": 1 / 2,
        "no_answer_f1": 1 / 2,
        # Only cat is answered: that and both without an answer are right.
        "best_exact_match": 3 / 4,
        "best_exact_match_threshold": -3.0,
        "best_f1": 3 / 4,
        "best_threshold": -3.0,
    }
    assert metrics_1_1(["cat", "dog"], expected[:2]) == {"exact_match": 1 / 2, "f1": (1 + 2 / 3) / 2}


def test_a_part_that_is_not_there_is_not_measured():
    found = metrics_2_0(["cat"], [["cat"]], spans=["cat"], odds=np.array([0.5]))
    assert not any(name.startswith("no_answer") for name in found)
    assert found["has_answer_f1"] == 1.0
