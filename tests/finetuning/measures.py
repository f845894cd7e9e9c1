"""Metrics of logits, by the libraries themselves and by SQuAD's own definition."""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats
from seqeval import metrics as entities
from sklearn import metrics

from megatron_bert_tp.config.task_table import Kind
from tests.finetuning.features import IGNORED, Part

Logits = Sequence[npt.NDArray[np.float64]]
"""One array for each sample, of the choices, or of the tokens."""
N_BEST, LONGEST = 20, 30


def measures_of(kind: Kind, part: Part, logits: Logits, names: Sequence[str]) -> dict[str, float]:
    """The metrics of the task of this kind in `tests.finetuning.cases`."""
    return _MEASURES[kind](part, logits, names)


def _class(part: Part, logits: Logits, _names: Sequence[str]) -> dict[str, float]:
    best = [int(row.argmax()) for row in logits]
    return {"f1": metrics.f1_score(part.expected, best), "accuracy": metrics.accuracy_score(part.expected, best)}


def _classes(part: Part, logits: Logits, _names: Sequence[str]) -> dict[str, float]:
    expected, holds = np.array(part.expected, dtype=int), np.stack(logits) > 0
    return {
        "f1_micro": metrics.f1_score(expected, holds, average="micro", zero_division=0),
        "f1_macro": metrics.f1_score(expected, holds, average="macro", zero_division=0),
        "exact_match": metrics.accuracy_score(expected, holds),
    }


def _number(part: Part, logits: Logits, _names: Sequence[str]) -> dict[str, float]:
    values = np.stack(logits)[:, 0]
    return {
        "pearson": stats.pearsonr(values, part.expected).statistic,
        "spearman": stats.spearmanr(values, part.expected).statistic,
    }


def _choice(part: Part, logits: Logits, _names: Sequence[str]) -> dict[str, float]:
    return {"accuracy": metrics.accuracy_score(part.expected, [int(row.argmax()) for row in logits])}


def _tags(part: Part, logits: Logits, names: Sequence[str]) -> dict[str, float]:
    said = [
        [names[int(row.argmax())] for row, label in zip(rows, sample.label, strict=True) if label != IGNORED]
        for rows, sample in zip(logits, part.samples, strict=True)
    ]
    expected = list(part.expected)
    return {
        "f1": entities.f1_score(expected, said, zero_division=0),
        "precision": entities.precision_score(expected, said, zero_division=0),
        "recall": entities.recall_score(expected, said, zero_division=0),
        "accuracy": metrics.accuracy_score(list(chain(*expected)), list(chain(*said))),
    }


def _answer(part: Part, logits: Logits, _names: Sequence[str]) -> dict[str, float]:
    said = [_said(part, logits, number) for number in range(len(part.expected))]
    pairs = list(zip(said, part.expected, strict=True))
    return {
        "exact_match": float(np.mean([max(_plain(text) == _plain(each) for each in own) for text, own in pairs])),
        "f1": float(np.mean([max(_shared(text, each) for each in own) for text, own in pairs])),
    }


def _said(part: Part, logits: Logits, number: int) -> str:
    """The span of the highest sum of logits among the best starts and ends of every window of an example."""
    found = []
    for sample, rows in zip(part.samples, logits, strict=True):
        if sample.example != number:
            continue
        starts, ends = (np.argsort(rows[:, side])[::-1][:N_BEST] for side in (0, 1))
        for start in starts:
            for end in ends:
                first, last = sample.offsets[start], sample.offsets[end]
                if first is None or last is None or not 0 <= end - start < LONGEST:
                    continue
                score = rows[start, 0] + rows[end, 1]
                found.append((score, part.contexts[number][first[0] : last[1]]))
    return max(found)[1] if found else "empty"


def _plain(text: str) -> str:
    bare = "".join(mark for mark in text.lower() if mark not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _shared(one: str, other: str) -> float:
    """F1 of the words of two answers."""
    left, right = _plain(one).split(), _plain(other).split()
    if not left or not right:
        return float(left == right)
    both = sum((Counter(left) & Counter(right)).values())
    return 2 * both / (len(left) + len(right))


_MEASURES: Mapping[Kind, Callable[[Part, Logits, Sequence[str]], dict[str, Any]]] = {
    Kind.CLASS: _class,
    Kind.CLASSES: _classes,
    Kind.NUMBER: _number,
    Kind.CHOICE: _choice,
    Kind.ANSWER: _answer,
    Kind.TAGS: _tags,
}
