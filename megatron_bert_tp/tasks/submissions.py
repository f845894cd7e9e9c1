"""Predictions in the layouts in which benchmarks and their evaluation scripts want them.

Each function gives the content of every file under its name.  Tasks of one's own have none.
"""

import json
import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from megatron_bert_tp.tasks.answers import Answers
from megatron_bert_tp.tasks.examples import Example, WordsExample
from megatron_bert_tp.tasks.task import TASKS

Files = Mapping[str, str]

_GLUE = {
    "cola": "CoLA",
    "sst-2": "SST-2",
    "mrpc": "MRPC",
    "sts-b": "STS-B",
    "qqp": "QQP",
    "mnli": "MNLI",
    "qnli": "QNLI",
    "rte": "RTE",
    "wnli": "WNLI",
}
_MNLI_PARTS = {"matched": "MNLI-m", "mismatched": "MNLI-mm"}
_WANTS_NAMES = {"mnli", "qnli", "rte"}
_OF_CANDIDATE = ("text", "probability", "start_logit", "end_logit")


def classes(name: str, examples: Sequence[Example], labels: Sequence[str]) -> Files:
    """GLUE's file of the ``labels`` of each group: names where its site wants these, else its numbers.

    No file where the classes are not GLUE's own.
    """
    if name not in _GLUE or not set(labels) <= set(TASKS[name].labels or ()):
        return {}
    numbers = {label: str(number) for number, label in enumerate(TASKS[name].labels or ())}
    return _glue(name, examples, [label if name in _WANTS_NAMES else numbers[label] for label in labels])


def numbers(name: str, examples: Sequence[Example], values: Sequence[float]) -> Files:
    """GLUE's file of STS-B, one for each group: values between 0 and 5 with three decimals."""
    return _glue(name, examples, [f"{min(5.0, max(0.0, value)):.3f}" for value in values]) if name in _GLUE else {}


def choices(name: str, examples: Sequence[Example], best: Sequence[int]) -> Files:
    """RACE's answers by file: ``{"high1.txt": ["A", "D", ...]}``, in the order of the questions."""
    if name != "race":
        return {}
    letters = defaultdict(list)
    for example, number in zip(examples, best, strict=True):
        # The reader calls a question by its file and its number in it.
        letters[example.id.rpartition("-")[0]].append(string.ascii_uppercase[number])
    return {"RACE.json": _json(letters)}


def answers(examples: Sequence[Example], found: Sequence[Answers], *, threshold: float) -> Files:
    """What SQuAD's evaluation scripts read: answers, the n best, and the odds against any (``--na-prob-file``)."""
    pairs = [(example.id, each) for example, each in zip(examples, found, strict=True)]
    files = {
        "predictions.json": _json({name: each.said(threshold).text for name, each in pairs}),
        "nbest_predictions.json": _json({name: _candidates(each) for name, each in pairs}),
    }
    if any(each.odds is not None for each in found):
        files["null_odds.json"] = _json({name: each.odds for name, each in pairs})
    return files


def columns(examples: Sequence[WordsExample], tags: Sequence[Sequence[str]]) -> Files:
    """Lines as conlleval reads them: word, expected tag if known, predicted tag; a blank line ends a sentence.

    White space within a word, which would be another column there, becomes ``_``.
    """
    sentences = []
    for example, found in zip(examples, tags, strict=True):
        words = ["_".join(word.split()) for word in example.words]
        sides = (words, found) if example.tags is None else (words, example.tags, found)
        sentences.append("".join(f"{' '.join(line)}\n" for line in zip(*sides, strict=True)))
    return {"predictions.conll": "".join(f"{sentence}\n" for sentence in sentences)}


def _glue(name: str, examples: Sequence[Example], values: Sequence[str]) -> Files:
    """A file for each group.

    The index is the one of GLUE's file, which ids end in; where they do not, it is the place in the file.
    """
    rows: dict[str, list[tuple[str, str]]] = {example.group: [] for example in examples}
    for example, value in zip(examples, values, strict=True):
        # Of several files, the reader puts the name and a colon before the index.
        rows[example.group].append((example.id.rpartition(":")[2], value))
    files = _glue_files(name, tuple(rows))
    return {f"{files[group]}.tsv": _table(found) for group, found in rows.items()}


def _glue_files(name: str, groups: Sequence[str]) -> Mapping[str, str]:
    """A name for each group: of MNLI's parts those of its site, and a single file of it is taken for matched."""
    if len(groups) == 1:
        alone = _MNLI_PARTS["matched"] if name == "mnli" else _GLUE[name]
        return {group: _MNLI_PARTS.get(group, alone) for group in groups}
    by_group = {group: f"{_GLUE[name]}-{group}" for group in groups}
    parts = {group: _MNLI_PARTS.get(group, file) for group, file in by_group.items()}
    # A file that is called m would be written over by the matched one beside it.
    return parts if name == "mnli" and len(set(parts.values())) == len(groups) else by_group


def _table(rows: Sequence[tuple[str, str]]) -> str:
    has_index = all(index.isascii() and index.isdecimal() for index, _ in rows)
    lines = [f"{index if has_index else place}\t{value}" for place, (index, value) in enumerate(rows)]
    return "\n".join(["index\tprediction", *lines, ""])


def _candidates(found: Answers) -> list[dict[str, object]]:
    records = [asdict(candidate) for candidate in found.candidates]
    return [{name: record[name] for name in _OF_CANDIDATE} for record in records]


def _json(content: Mapping[str, object]) -> str:
    return json.dumps(content, indent=1) + "\n"
