"""SQuAD 1.1 and 2.0: questions about contexts, with the places of their answers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_bert_tp.config.problems import counted
from megatron_bert_tp.config.task_schema import TaskConfig
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks.examples import UNKNOWN_PLACE, Answer, AnswerExample, Example
from megatron_bert_tp.tasks.reading import cells
from megatron_bert_tp.tasks.reading.datasets_folder import folder_rows
from megatron_bert_tp.tasks.reading.json_values import parse_json, shown
from megatron_bert_tp.tasks.reading.lines import read_whole
from megatron_bert_tp.tasks.reading.parts import Note, Part, Source
from megatron_bert_tp.tasks.reading.row import Row, Wanted

_MOST_NAMED = 5
_MEASURED = ("kept, to measure by the text", "left out of the loss")
_MENDED: dict[Part, tuple[str, str]] = {
    "training": ("left out", "passed over"),
    "validation": _MEASURED,
    "test": _MEASURED,
}
"""What becomes of answers that do not stand at their place, and of questions that have no other."""


@dataclass
class _Tally:
    """What one file has; ``bad`` are the questions of answers that do not stand at their place, one each.

    ``num_misplaced`` counts the questions that have no other answer.
    """

    num_answers: int = 0
    num_impossible: int = 0
    num_blank: int = 0
    num_misplaced: int = 0
    bad: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Question:
    place: str
    id: str
    text: str
    context: str
    is_impossible: bool
    answers: tuple[Answer, ...] | None
    """None where the file has none, which is no label."""


def read_squad(task: TaskConfig, source: Source) -> Iterator[Example | Note]:
    """An example for each question; contexts and answers as they are, white space included.

    An answer whose text does not stand at its place is counted; DataError when such answers are more than
    `task.bad_answers` of all in the file.  Training leaves it out, and passes over a question that has no other.
    What is measured by, as the evaluation scripts do, is its text: validation and test keep this, with
    `UNKNOWN_PLACE`.  Questions without an answer are passed over where `task.unanswerable` is false.
    """
    tally = _Tally()
    questions = list(_questions_of_folder(source) if source.path.is_dir() else _questions(source.path))
    # Empty lists of answers say something only where the file says anything at all.
    is_known = source.is_labelled or any(each.answers or each.is_impossible for each in questions)
    examples = [_example(question, task, source, tally, is_known=is_known) for question in questions]
    notes = _notes(tally, task, source)
    yield from (example for example in examples if example is not None)
    yield from notes


def _example(
    question: _Question, task: TaskConfig, source: Source, tally_: _Tally, *, is_known: bool
) -> AnswerExample | None:
    # A folder has no other way to say it.
    says_so = task.unanswerable is True or source.path.is_dir()
    is_impossible = question.is_impossible or (is_known and says_so and question.answers == ())
    if is_impossible and task.unanswerable is False:
        tally_.num_impossible += 1
        return None
    if source.is_labelled and not is_impossible and not question.answers:
        raise DataError(
            f"{question.place}: has no answer, and is_impossible is not true; mend the file, or set "
            "task.unanswerable to true if there is none in the context"
        )
    answers = _placed(question, tally_)
    if source.part == "training":
        answers = tuple(answer for answer in answers if answer.start != UNKNOWN_PLACE)
        if question.answers and not answers:
            return None
    tally_.num_blank += not question.text.strip()
    return AnswerExample(
        id=question.id,
        place=question.place,
        group=source.group,
        question=question.text,
        context=question.context,
        answers=answers,
        is_labelled=is_impossible or bool(answers),
    )


def _placed(question: _Question, tally_: _Tally) -> tuple[Answer, ...]:
    """The answers, those that do not stand at their place with an unknown one."""
    given = question.answers or ()
    found = tuple(
        answer if _stands(answer, question.context) else replace(answer, start=UNKNOWN_PLACE) for answer in given
    )
    num_bad = sum(answer.start == UNKNOWN_PLACE for answer in found)
    tally_.num_answers += len(found)
    tally_.bad += [question.id] * num_bad
    tally_.num_misplaced += bool(found) and num_bad == len(found)
    return found


def _stands(answer: Answer, context: str) -> bool:
    end = answer.start + len(answer.text)
    return bool(answer.text) and answer.start >= 0 and context[answer.start : end] == answer.text


def _notes(tally: _Tally, task: TaskConfig, source: Source) -> list[Note]:
    notes, path = [], source.path
    if tally.bad:
        named = list(dict.fromkeys(tally.bad))
        verb = "does not stand at its" if len(tally.bad) == 1 else "do not stand at their"
        told = f"{len(tally.bad):,} of {counted(tally.num_answers, 'answer')} {verb} answer_start"
        more = ", ..." * (len(named) > _MOST_NAMED)
        first = f"question{'s' * (len(named) > 1)} {', '.join(named[:_MOST_NAMED])}{more}"
        if len(tally.bad) > task.bad_answers * tally.num_answers:
            raise DataError(
                f"{path}: {told} ({first}), more than task.bad_answers ({task.bad_answers}); mend the file, or "
                "allow more"
            )
        kept, of_others = _MENDED[source.part]
        questions = counted(tally.num_misplaced, "question that has no other", "questions that have no other")
        others = f", and {questions} {of_others}"
        notes.append(Note(f"{path}: {told}: {kept}{others * bool(tally.num_misplaced)} ({first})"))
    if tally.num_impossible:
        notes.append(
            Note(
                f"{path}: {counted(tally.num_impossible, 'question')} without an answer passed over, by "
                "task.unanswerable"
            )
        )
    if tally.num_blank:
        kept_so = "question without text, kept as it is", "questions without text, kept as they are"
        notes.append(Note(f"{path}: {counted(tally.num_blank, *kept_so)}"))
    return notes


def _questions(path: Path) -> Iterator[_Question]:
    values = parse_json(read_whole(path), path)
    for article, at_article in _items(values, "data", f"{path}: the file"):
        for paragraph, at_paragraph in _items(article, "paragraphs", f"{path}: {at_article}"):
            place = f"{path}: {at_article}.{at_paragraph}"
            context = _text(paragraph, "context", place)
            if not context.strip():
                raise DataError(f"{place}: the context is empty; mend the file")
            for question, at_question in _items(paragraph, "qas", place):
                yield _question(question, context, path, f"{place}.{at_question}")


def _questions_of_folder(source: Source) -> Iterator[_Question]:
    """Rows as `squad` and `squad_v2` on Hugging Face's hub have them: no answer where the list is empty."""
    label = ("answers",)
    texts = ("id", "question", "context")
    wanted = Wanted(needed=texts + label) if source.is_labelled else Wanted(needed=texts, optional=label)
    for row in folder_rows(source.path, wanted):
        answers = _answers_of_row(row)
        yield _Question(
            place=row.place,
            id=_text(row.values, "id", row.place),
            text=_text(row.values, "question", row.place),
            context=cells.text_of(row, "context"),
            is_impossible=False,
            answers=answers,
        )


def _answers_of_row(row: Row) -> tuple[Answer, ...]:
    given = row.values.get("answers") or {"text": [], "answer_start": []}
    texts, starts = (given.get(key) if isinstance(given, dict) else None for key in ("text", "answer_start"))
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise DataError(f"{row.place}: 'answers' must be lists 'text' and 'answer_start', not {shown(given)}")
    pairs = zip(texts, starts, strict=True)
    return tuple(_answer({"text": text, "answer_start": start}, row.place) for text, start in pairs)


def _question(values: Mapping[str, object], context: str, path: Path, place: str) -> _Question:
    name, is_impossible = _text(values, "id", place), values.get("is_impossible", False)
    place = f"{path}: question {name}"
    if not isinstance(is_impossible, bool):
        raise DataError(f"{place}: is_impossible must be true or false, but it is {shown(is_impossible)}")
    answers = None
    if values.get("answers") is not None:
        answers = tuple(_answer(answer, place) for answer, _ in _items(values, "answers", place))
    if is_impossible and answers:
        found = counted(len(answers), "answer")
        raise DataError(f"{place}: is_impossible is true, but it has {found}; mend the file")
    return _Question(place, name, _text(values, "question", place), context, is_impossible, answers)


def _answer(values: Mapping[str, object], place: str) -> Answer:
    start = values.get("answer_start")
    if not isinstance(start, int) or isinstance(start, bool):
        raise DataError(f"{place}: answer_start must be a whole number, but it is {shown(start)}; mend the file")
    return Answer(_text(values, "text", place), start)


def _items(values: object, key: str, place: str) -> Iterator[tuple[Mapping[str, object], str]]:
    """Objects of the list under a key, each with its name in messages, as ``data[3]``."""
    items = values.get(key) if isinstance(values, dict) else None
    if not isinstance(items, list):
        raise DataError(f"{place}: must be an object with a list {key!r}, not {shown(values)}; is this SQuAD?")
    for number, item in enumerate(items):
        if not isinstance(item, dict):
            raise DataError(f"{place}: {key}[{number}] must be an object, but it is {shown(item)}; is this SQuAD?")
        yield item, f"{key}[{number}]"


def _text(values: Mapping[str, object], key: str, place: str) -> str:
    text = values.get(key)
    if not isinstance(text, str):
        raise DataError(f"{place}: {key!r} must be a text, but it is {shown(text)}; mend the file")
    return text
