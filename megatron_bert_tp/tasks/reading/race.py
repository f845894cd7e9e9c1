"""RACE: folders of files, each an article with its questions and their options."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_bert_tp.config.problems import counted
from megatron_bert_tp.config.task_schema import TaskConfig
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks.examples import ChoiceExample, Example
from megatron_bert_tp.tasks.reading.json_values import parse_json, shown
from megatron_bert_tp.tasks.reading.lines import read_whole
from megatron_bert_tp.tasks.reading.parts import Note, Source

_LEVELS = ("middle", "high")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_BLANK = re.compile("_+")


@dataclass(frozen=True)
class _Question:
    place: str
    text: str
    options: tuple[str, ...]
    answer: int | None


def read_race(_task: TaskConfig, source: Source) -> Iterator[Example | Note]:
    """An example for each question of the files of a folder, or of its folders ``middle`` and ``high``.

    Files come in the order of their numbers.  A pair is the question with one option, then the article; the option
    fills the blank of the question (one or more ``_``), or follows it.  The id is the article's, a dash, and the
    number of the question from 0.
    """
    num_incomplete = 0
    for path, group in _files(source):
        name, article, questions = _read(path, is_labelled=source.is_labelled)
        for number, question in enumerate(questions):
            num_incomplete += not (question.text.strip() and all(map(str.strip, question.options)))
            yield ChoiceExample(
                id=f"{name}-{number}",
                place=question.place,
                group=group,
                pairs=tuple((_filled(question.text, option), article) for option in question.options),
                label=question.answer,
            )
    if num_incomplete:
        told = counted(
            num_incomplete,
            "question empty or with an empty option, kept as it is",
            "questions empty or with an empty option, kept as they are",
        )
        yield Note(f"{source.path}: {told}")


def _files(source: Source) -> list[tuple[Path, str]]:
    """Files of articles with their groups; DataError where there are none."""
    if not source.path.is_dir():
        raise DataError(f"{source.path}: is a file; name the folder, or the one with middle and high")
    names = {level: f"{source.group}_{level}" if source.group else level for level in _LEVELS}
    levels = [(source.path / level, name) for level, name in names.items() if (source.path / level).is_dir()]
    found = [
        (path, group)
        for folder, group in levels or [(source.path, source.group)]
        for path in sorted(folder.glob("[!.]*.txt"), key=_in_order)
    ]
    if not found:
        raise DataError(
            f"{source.path}: has no articles, which are looked for as *.txt in it or in its folders middle and "
            "high; name the folder of one part, such as RACE/train"
        )
    return found


def _in_order(path: Path) -> tuple[float, str]:
    return (int(path.stem) if path.stem.isdecimal() else float("inf"), path.stem)


def _filled(question: str, option: str) -> str:
    if "_" in question:
        return _BLANK.sub(lambda _blank: option, question)
    return " ".join(part for part in (question, option) if part.strip())


def _read(path: Path, *, is_labelled: bool) -> tuple[str, str, list[_Question]]:
    """Name and text of the article of a file, and its questions."""
    values = parse_json(read_whole(path), path)
    if not isinstance(values, dict):
        raise DataError(f"{path}: must be one JSON object, but it is {shown(values)}")
    name, article = values.get("id"), values.get("article")
    for key, value in (("id", name), ("article", article)):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{path}: {key!r} must be a text, but it is {shown(value)}; fetch the file again")
    assert isinstance(name, str)
    assert isinstance(article, str)
    return name, article, _questions(values, path, is_labelled=is_labelled)


def _questions(values: Mapping[str, object], path: Path, *, is_labelled: bool) -> list[_Question]:
    texts, options = _texts(values, "questions", path), values.get("options")
    if not isinstance(options, list) or len(options) != len(texts):
        raise DataError(f"{path}: 'options' must have a list for each of {counted(len(texts), 'question')}")
    answers: list[str] | None = None
    if is_labelled or values.get("answers") is not None:
        answers = _texts(values, "answers", path)
        if len(answers) != len(texts):
            told = f"{counted(len(answers), 'answer')} beside {counted(len(texts), 'question')}"
            raise DataError(f"{path}: {told}; fetch the file again")
    found = []
    for number, (text, choices) in enumerate(zip(texts, options, strict=True)):
        place = f"{path}, question {number}"
        given = _options(choices, place)
        answer = None if answers is None else _answer(answers[number], len(given), place)
        found.append(_Question(place, text, given, answer))
    return found


def _texts(values: Mapping[str, object], key: str, path: Path) -> list[str]:
    texts = values.get(key)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{path}: {key!r} must be a list of texts, but it is {shown(texts)}; fetch the file again")
    return texts


def _options(options: object, place: str) -> tuple[str, ...]:
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options) or len(options) < 2:
        raise DataError(f"{place}: the options must be two texts or more, but they are {shown(options)}")
    return tuple(options)


def _answer(letter: str, num_options: int, place: str) -> int:
    letters = _LETTERS[:num_options]
    if len(letter) != 1 or letter not in letters:
        raise DataError(
            f"{place}: the answer {letter!r} is none of the {num_options} options, which are "
            f"{', '.join(letters)}; mend the file"
        )
    return letters.index(letter)
