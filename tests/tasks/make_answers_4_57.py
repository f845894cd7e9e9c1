"""Golden answers of the reference post-processing of transformers, and their scores by transformers 4.57.

Run from the root of the repository, in an environment with the versions that the file it writes names, with
``examples/pytorch/question-answering/utils_qa.py`` of the repository of transformers, which its package has not:

    python -m tests.tasks.make_answers_4_57 utils_qa.py ../shared/data

It writes `answers_4_57.json` beside itself.  Of questions of SQuAD only digests are kept.
"""

import importlib.util
import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tokenizers
import transformers
from transformers import BertTokenizerFast
from transformers.data.metrics.squad_metrics import squad_evaluate

from tests.prediction.texts import VOCABULARIES
from tests.tasks.answering import MODES, Mode, Question, digest, logits_of, questions_of

OUT = Path(__file__).parent / "answers_4_57.json"
REAL_VOCABULARY = "vocab/bert-large-uncased-vocab.txt"


class Rows(list):
    """A list of records that also gives a column, as data sets do."""

    def __getitem__(self, key):
        return [record[key] for record in self] if isinstance(key, str) else super().__getitem__(key)


def tokenizer_of(mode: Mode, data: Path, folder: Path) -> BertTokenizerFast:
    path = data / REAL_VOCABULARY
    if not mode.file:
        path = folder / "vocab.txt"
        path.write_text("".join(f"{entry}\n" for entry in VOCABULARIES["uncased"]), encoding="utf-8")
    return BertTokenizerFast(str(path), do_lower_case=True)


def features_of(mode: Mode, questions: list[Question], tokenizer: BertTokenizerFast) -> list[dict[str, Any]]:
    features = []
    for number, asked in enumerate(questions):
        encoding = tokenizer(
            asked.question.lstrip(),
            asked.context,
            truncation="only_second",
            max_length=mode.size,
            stride=mode.overlap,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for row, offsets in enumerate(encoding["offset_mapping"]):
            kept = [
                pair if segment == 1 else None
                for pair, segment in zip(offsets, encoding.sequence_ids(row), strict=True)
            ]
            features.append({"number": number, "example_id": asked.id, "offset_mapping": kept})
    return features


def answered(
    mode: Mode, questions: list[Question], features: list[dict[str, Any]], post_process: Any
) -> dict[str, Any]:
    spans = [np.array([pair or (-1, -1) for pair in each["offset_mapping"]]) for each in features]
    windows = [(each["number"], span) for each, span in zip(features, spans, strict=True)]
    bounds = np.cumsum([0, *map(len, spans)])
    logits = logits_of(windows, questions)
    parts = [slice(*pair) for pair in pairwise(bounds)]
    for part in parts:
        for side in (0, 1):  # numpy's order of equal logits is not defined
            best = np.sort(logits[part, side])[-mode.n_best - 1 :]
            assert len(set(best.tolist())) == len(best)
    with tempfile.TemporaryDirectory() as folder:
        post_process(
            Rows({"id": each.id, "context": each.context} for each in questions),
            features,
            tuple([logits[part, side] for part in parts] for side in (0, 1)),
            version_2_with_negative=mode.may_be_none,
            n_best_size=mode.n_best,
            max_answer_length=mode.longest,
            output_dir=folder,
        )
        files = {path.stem: json.loads(path.read_text()) for path in Path(folder).iterdir()}
    return {"tokens": len(logits), "windows": len(features), **files}


def scores(questions: list[Question], found: dict[str, Any]) -> dict[str, float]:
    examples = [
        SimpleNamespace(qas_id=each.id, answers=[{"text": text} for text, _ in each.answers]) for each in questions
    ]
    odds = found.get("null_odds")
    said = squad_evaluate(examples, found["predictions"], odds)
    # The search of the threshold wants the answers that are said below it, whatever speaks against them.
    spans = {
        name: next(each["text"] for each in best if each["text"])
        for name, best in found["nbest_predictions"].items()
    }
    searched = squad_evaluate(examples, spans, odds)
    best = {name: value for name, value in searched.items() if name.startswith("best_")}
    return {name: value for name, value in said.items() if not name.startswith("best_")} | (best if odds else {})


def golden(mode: Mode, data: Path, post_process: Any) -> dict[str, Any]:
    questions = questions_of(mode, data / "squad")
    with tempfile.TemporaryDirectory() as folder:
        features = features_of(mode, questions, tokenizer_of(mode, data, Path(folder)))
    found = answered(mode, questions, features, post_process)
    known = {name: found[name] for name in ("tokens", "windows")} | {"scores": scores(questions, found)}
    if not mode.file:
        return known | {"questions": {name: value for name, value in found.items() if name not in known}}
    odds = found.get("null_odds", {})
    digests = [
        digest(found["predictions"][each.id], found["nbest_predictions"][each.id], odds.get(each.id))
        for each in questions
    ]
    return known | {"digests": " ".join(digests)}


def main() -> None:
    specification = importlib.util.spec_from_file_location("utils_qa", sys.argv[1])
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    content = {
        "versions": {each.__name__: each.__version__ for each in (transformers, tokenizers, np)},
        "modes": {
            name: golden(mode, Path(sys.argv[2]), module.postprocess_qa_predictions)
            for name, mode in MODES.items()
        },
    }
    OUT.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
