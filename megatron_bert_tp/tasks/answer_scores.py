"""Exact match and F1 of answers as SQuAD defines them, and the search of the threshold for no answer.

All scores are in [0, 1]; SQuAD's own scripts print them times 100.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.errors import DataError

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Rule = Callable[[str, Sequence[str]], tuple[float, float]]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_THRESHOLDS = {"exact_match": "best_exact_match_threshold", "f1": "best_threshold"}


def normalized(text: str) -> str:
    """What is compared of a text: no capitals, no ASCII punctuation, no English articles, single blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def word_f1(answer: str, expected: str) -> float:
    """F1 of the words that two answers have in common, each word as often as both have it; 0 without one."""
    said, wanted = normalized(answer).split(), normalized(expected).split()
    num_same = (Counter(said) & Counter(wanted)).total()
    if not num_same:
        return 0.0
    precision, recall = num_same / len(said), num_same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def scores_1_1(answer: str, expected: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 against the best fitting of the expected answers, as SQuAD 1.1 has it.

    DataError where none is expected: only SQuAD 2.0 says what is right then.
    """
    if not expected:
        raise DataError(
            "no answer is expected of a question, which SQuAD 1.1 does not measure; set task.unanswerable=true"
        )
    exact = max(float(normalized(answer) == normalized(each)) for each in expected)
    return exact, max(word_f1(answer, each) for each in expected)


def scores_2_0(answer: str, expected: Sequence[str]) -> tuple[float, float]:
    """The same as SQuAD 2.0 has it: where nothing is expected, only an empty answer is right.

    Expected answers of articles and punctuation alone do not count, and an answer of these alone is empty.
    """
    known = [each for each in expected if normalized(each)]
    if known:
        return scores_1_1(answer, known)
    is_right = float(not normalized(answer))
    return is_right, is_right


@dataclass(frozen=True)
class Threshold:
    """The best mean score that a threshold can give, and the largest odds against an answer that still has one."""

    score: float
    odds: float


def best_threshold(scores: Floats, is_answerable: Flags, odds: Floats) -> Threshold:
    """The threshold with the best mean score; of equal ones the lowest.

    ``scores`` ``[examples]`` are those of the best span of each example, ``odds`` ``[examples]`` speak against it.
    An example without an answer counts 1 above the threshold and 0 below it.  This is the search of SQuAD 2.0's
    evaluation, but for two cases in which that names a threshold that does not give its score: examples of equal
    odds are taken together, and where no answer at all is best, the threshold lies below all odds (there: 0).
    """
    order = np.argsort(odds, kind="stable")
    gains = np.where(is_answerable, scores, -1.0)[order]
    totals = np.cumsum(np.concatenate([[float((~is_answerable).sum())], gains]))
    limits = np.concatenate([[np.nextafter(odds.min(), -np.inf)], odds[order]])
    is_last = np.append(limits[1:] != limits[:-1], True)
    best = int(np.argmax(totals[is_last]))
    return Threshold(score=float(totals[is_last][best]) / len(odds), odds=float(limits[is_last][best]))


def metrics_1_1(answers: Sequence[str], expected: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means of exact match and F1 where every question has an answer; DataError where one has none."""
    return {name: float(values.mean()) for name, values in _scores(answers, expected, scores_1_1).items()}


def metrics_2_0(
    answers: Sequence[str], expected: Sequence[Sequence[str]], *, spans: Sequence[str], odds: Floats
) -> dict[str, float]:
    """Means of exact match and F1 where questions may have no answer.

    ``answers`` are what is said (empty: no answer), ``spans`` the best spans whatever speaks against them, and
    ``odds`` ``[examples]`` what does.  ``has_answer_`` and ``no_answer_`` begin the names of the means of a part,
    ``best_`` those of what the best threshold on the odds would give: `best_threshold` for F1,
    ``best_exact_match_threshold`` for the other.
    """
    is_answerable = np.array([bool(each) for each in expected])
    found: dict[str, float] = {}
    for name, values in _scores(answers, expected, scores_2_0).items():
        parts = {"": is_answerable | True, "has_answer_": is_answerable, "no_answer_": ~is_answerable}
        found |= {f"{part}{name}": float(values[chosen].mean()) for part, chosen in parts.items() if chosen.any()}
    for name, values in _scores(spans, expected, scores_2_0).items():
        best = best_threshold(values, is_answerable, odds)
        found |= {f"best_{name}": best.score, _THRESHOLDS[name]: best.odds}
    return found


def _scores(answers: Sequence[str], expected: Sequence[Sequence[str]], rule: Rule) -> Mapping[str, Floats]:
    """``[examples]`` of both scores."""
    pairs = np.array([rule(answer, each) for answer, each in zip(answers, expected, strict=True)])
    return {"exact_match": pairs[:, 0], "f1": pairs[:, 1]}
