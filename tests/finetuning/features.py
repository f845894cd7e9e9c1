"""Samples of a task straight from its files, by `BertTokenizerFast` and the rules of `transformers`' examples."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import BertTokenizerFast

from megatron_bert_tp.config.task_table import Kind
from tests.finetuning.cases import OVERLAP, TOPICS, Files

IGNORED = -100


@dataclass(frozen=True)
class Sample:
    """What the model reads: a row, or one for each choice; ``label`` as the model takes it.

    ``example`` is the place of its example in the file, ``offsets`` are the characters of a window's tokens.
    """

    rows: tuple[tuple[list[int], list[int]], ...]
    label: Any
    example: int
    offsets: Sequence[tuple[int, int] | None] = ()


@dataclass(frozen=True)
class Part:
    """Samples and what predictions are compared with, by example."""

    samples: tuple[Sample, ...]
    expected: tuple[Any, ...]
    contexts: tuple[str, ...] = field(default=())


def tokenizer_of(weights: Path) -> BertTokenizerFast:
    entries = (weights / "vocab.txt").read_text(encoding="utf-8").splitlines()
    ids = {entry: number for number, entry in enumerate(entries)}
    return BertTokenizerFast(vocab=ids, do_lower_case=True, model_max_length=512)


def part_of(kind: Kind, files: Files, path: Path, names: Sequence[str]) -> Part:
    """``names`` are the tags of the task in the order of their numbers."""
    return _PARTS[kind](files, path, names)


def tag_names(path: Path) -> tuple[str, ...]:
    """O, and two tags for each type of the file in order."""
    kinds = sorted({tag[2:] for _, tags in _sentences(path) for tag in tags} - {""})
    return ("O", *(f"{begin}-{kind}" for kind in kinds for begin in "BI"))


def _row(encoding: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    return encoding["input_ids"], encoding["token_type_ids"]


def _columns(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a file of GLUE, which knows no quotes."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        head = next(file).rstrip("\n").split("\t")
        for line in file:
            yield dict(zip(head, line.rstrip("\n").split("\t"), strict=True))


def _texts(files: Files, rows: Sequence[tuple[tuple[str, ...], Any]]) -> Part:
    """`run_glue.py`: texts or pairs, cut to the longest sample."""
    tokenizer = tokenizer_of(files.weights)
    samples = [
        Sample((_row(tokenizer(*texts, truncation=True, max_length=files.length)),), label, number)
        for number, (texts, label) in enumerate(rows)
    ]
    return Part(tuple(samples), tuple(label for _, label in rows))


def _pairs(files: Files, path: Path, _names: Sequence[str]) -> Part:
    found = [((row["#1 String"], row["#2 String"]), int(row["Quality"])) for row in _columns(path)]
    return _texts(files, found)


def _numbers(files: Files, path: Path, _names: Sequence[str]) -> Part:
    found = [((row["sentence1"], row["sentence2"]), float(row["score"])) for row in _columns(path)]
    return _texts(files, found)


def _topics(files: Files, path: Path, _names: Sequence[str]) -> Part:
    names = sorted(TOPICS)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return _texts(
        files,
        [((row["text"],), [float(name in row["label"].split(",")) for name in names]) for row in rows],
    )


def _choices(files: Files, path: Path, _names: Sequence[str]) -> Part:
    """`run_swag.py`, the pairs being question with option, and article."""
    tokenizer, samples = tokenizer_of(files.weights), []
    for file in sorted(path.glob("middle/*.txt"), key=lambda each: int(each.stem)):
        content = json.loads(file.read_text(encoding="utf-8"))
        for question, options, answer in zip(
            content["questions"], content["options"], content["answers"], strict=True
        ):
            assert "_" not in question
            firsts = [f"{question} {option}" for option in options]
            rows = [
                _row(tokenizer(first, content["article"], truncation=True, max_length=files.length))
                for first in firsts
            ]
            samples.append(Sample(tuple(rows), "ABC".index(answer), len(samples)))
    return Part(tuple(samples), tuple(sample.label for sample in samples))


def _answers(files: Files, path: Path, _names: Sequence[str]) -> Part:
    """`run_qa.py`: windows over the context, and the answer as the tokens that cover it, or [CLS] twice."""
    tokenizer = tokenizer_of(files.weights)
    samples, expected, contexts = [], [], []
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = [(each["text"], each["answer_start"]) for each in asked["answers"]]
                encoded = tokenizer(
                    asked["question"].lstrip(),
                    paragraph["context"],
                    truncation="only_second",
                    max_length=files.length,
                    stride=OVERLAP,
                    return_overflowing_tokens=True,
                    return_offsets_mapping=True,
                )
                for number, (ids, types) in enumerate(
                    zip(encoded["input_ids"], encoded["token_type_ids"], strict=True)
                ):
                    inside = [segment == 1 for segment in encoded.sequence_ids(number)]
                    offsets = [
                        pair if is_context else None
                        for pair, is_context in zip(encoded["offset_mapping"][number], inside, strict=True)
                    ]
                    label = _answer_tokens(offsets, *answers[0])
                    samples.append(Sample(((ids, types),), label, len(expected), offsets))
                expected.append([text for text, _ in answers])
                contexts.append(paragraph["context"])
    return Part(tuple(samples), tuple(expected), tuple(contexts))


def _answer_tokens(offsets: Sequence[tuple[int, int] | None], text: str, first: int) -> tuple[int, int]:
    shown = [(place, *pair) for place, pair in enumerate(offsets) if pair is not None]
    end = first + len(text)
    if shown[0][1] > first or shown[-1][2] < end:
        return 0, 0
    return (
        max(place for place, start, _ in shown if start <= first),
        min(place for place, _, stop in shown if stop >= end),
    )


def _tags(files: Files, path: Path, names: Sequence[str]) -> Part:
    """`run_ner.py`: the first token of a word has its tag."""
    tokenizer, samples, expected = tokenizer_of(files.weights), [], []
    for words, tags in _sentences(path):
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=files.length)
        numbers, label, before = encoded.word_ids(), [], None
        for number in numbers:
            is_first = number is not None and number != before
            label.append(names.index(tags[number]) if is_first else IGNORED)
            before = number
        assert sum(each != IGNORED for each in label) == len(words), "no sentence is cut"
        samples.append(Sample((_row(encoded),), label, len(expected)))
        expected.append(tags)
    return Part(tuple(samples), tuple(expected))


def _sentences(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    for block in path.read_text(encoding="utf-8").strip().split("\n\n"):
        lines = [line.split("\t") for line in block.split("\n")]
        yield [line[0] for line in lines], [line[1] for line in lines]


_PARTS: Mapping[Kind, Callable[[Files, Path, Sequence[str]], Part]] = {
    Kind.CLASS: _pairs,
    Kind.CLASSES: _topics,
    Kind.NUMBER: _numbers,
    Kind.CHOICE: _choices,
    Kind.ANSWER: _answers,
    Kind.TAGS: _tags,
}
