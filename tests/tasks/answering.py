"""Questions with made-up logits, whose answers by `transformers`' reference post-processing are golden."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.prediction.answering import QUESTIONS

LONGEST_QUESTION = 35  # characters: it leaves room for a context among 48 tokens
Array = npt.NDArray[Any]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True)
class Mode:
    """How questions are cut and answered.

    ``file`` is in ../shared/data/squad, or empty: questions of our own.
    """

    file: str
    may_be_none: bool
    n_best: int = 20
    longest: int = 30
    size: int = 384
    overlap: int = 128


MODES = {
    "made 1.1": Mode(file="", may_be_none=False, n_best=5, size=64, overlap=16),
    "made 2.0": Mode(file="", may_be_none=True, n_best=4, longest=6, size=64, overlap=16),
    "made, few": Mode(file="", may_be_none=True, n_best=1, size=48, overlap=8),
    "made 1.1, few": Mode(file="", may_be_none=False, n_best=1, longest=2, size=48, overlap=8),
    "real 1.1": Mode(file="xquad.en.json", may_be_none=False),
    "real 2.0": Mode(file="dev-v2.0.first1050.json", may_be_none=True),
    "real 2.0, short": Mode(
        file="dev-v2.0.first1050.json", may_be_none=True, n_best=3, longest=8, size=128, overlap=32
    ),
}


def questions_of(mode: Mode, folder: Path) -> list[Question]:
    """Questions of a file of SQuAD, or a few of our own; of those every third has no answer."""
    if mode.file:
        content = json.loads((folder / mode.file).read_text(encoding="utf-8"))
        return [
            Question(
                asked["id"],
                asked["question"],
                paragraph["context"],
                tuple((answer["text"], answer["answer_start"]) for answer in asked["answers"]),
            )
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
        ]
    pairs = [(question, context) for question, context, _ in QUESTIONS if len(question) < LONGEST_QUESTION]
    return [
        Question(
            f"q{number}", question, context, () if mode.may_be_none and number % 3 == 0 else ((context[:9], 0),)
        )
        for number, (question, context) in enumerate(pairs)
    ]


def logits_of(windows: Sequence[tuple[int, Array]], questions: Sequence[Question]) -> Array:
    """``[tokens, 2]`` float32: noise, from which for two of three questions the right answer stands out.

    ``windows`` are the number of the question and the spans ``[tokens, 2]`` of each, -1 outside of the context.
    """
    draws = np.random.default_rng(7)
    found = []
    for number, spans in windows:
        values = 2 * draws.standard_normal((len(spans), 2), dtype=np.float32)
        answers = questions[number].answers
        if number % 3 and answers:
            text, start = answers[0]
            values[spans[:, 0] == start, 0] += 6
            values[spans[:, 1] == start + len(text), 1] += 6
        elif number % 3:
            values[0] += 4
        found.append(values)
    return np.concatenate(found)


def digest(prediction: str, candidates: Sequence[Record], odds: float | None) -> str:
    """Of all that is said of a question but the probabilities, which are rounded in another way."""
    rows = [[each["text"], each["start_logit"], each["end_logit"]] for each in candidates]
    return hashlib.sha256(json.dumps([prediction, rows, odds]).encode()).hexdigest()[:8]
