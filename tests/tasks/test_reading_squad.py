"""SQuAD 1.1 and 2.0: answers at their place, and those that are not."""

import json
from collections import Counter

import pytest

from megatron_bert_tp.tasks.examples import UNKNOWN_PLACE, Answer
from tests.sources import real_data
from tests.tasks.reading import read, refusal, task, write

CONTEXT = "  Anna met Bo in Rome. "


def question(name, *answers, **more):
    given = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": name, "question": "Who?", "answers": given, **more}


def squad(path, *questions, context=CONTEXT, version="v2.0"):
    paragraphs = [{"context": context, "qas": list(questions)}]
    return write(path, json.dumps({"version": version, "data": [{"title": "t", "paragraphs": paragraphs}]}))


GOOD = question("a", ("Anna", 2))
BAD = question("b", ("Bo", 10))
NONE = question("n", is_impossible=True, plausible_answers=[{"text": "Rome", "answer_start": 17}])


def test_a_context_and_its_answers_are_taken_as_they_are(tmp_path):
    several = question("b", ("Bo", 11), ("Rome. ", 17))
    reading = read("squad", squad(tmp_path / "dev.json", GOOD, several))
    first, second = reading.examples
    assert (first.id, first.context, first.question) == ("a", CONTEXT, "Who?")
    assert second.answers == (Answer("Bo", 11), Answer("Rome. ", 17))
    assert reading.notes == ()


def independent(path, *, keep_impossible=True):
    """Id, context, question, answers of all questions, by a walk of our own."""
    data = json.loads(path.read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in data for paragraph in article["paragraphs"]]
    return [
        (q["id"], p["context"], q["question"], tuple(Answer(a["text"], a["answer_start"]) for a in q["answers"]))
        for p in paragraphs
        for q in p["qas"]
        if keep_impossible or not q.get("is_impossible")
    ]


PARTS = ["training", "validation", "test"]
FILES = [
    ("dev-v2.0.first1050.json", 1050, 540),
    ("train-v1.1.first4370.json", 4370, 0),
    ("xquad.en.json", 1190, 0),
]


@pytest.mark.parametrize(("name", "count", "num_impossible"), FILES)
@pytest.mark.parametrize("part", PARTS)
def test_all_questions_of_a_real_file_are_read(name, count, num_impossible, part):
    path = real_data(f"squad/{name}")
    reading = read("squad", path, part=part)
    examples = reading.examples
    assert [(e.id, e.context, e.question, e.answers) for e in examples] == independent(path)
    assert len(examples) == count
    assert Counter(bool(e.answers) for e in examples) == Counter(
        {True: count - num_impossible, False: num_impossible}
    )
    assert all(e.is_labelled for e in examples)
    assert all(e.context[a.start :].startswith(a.text) for e in examples for a in e.answers)
    assert reading.notes == ()


def test_impossible_questions_of_a_real_file_are_passed_over_when_told_so():
    path = real_data("squad/dev-v2.0.first1050.json")
    reading = read(task("squad", unanswerable=False), path)
    found = [(e.id, e.context, e.question, e.answers) for e in reading.examples]
    assert found == independent(path, keep_impossible=False)
    assert reading.notes == (f"{path}: 540 questions without an answer passed over, by task.unanswerable",)


def test_training_leaves_out_a_few_answers_that_do_not_stand_at_their_place_and_tells_it(tmp_path):
    partly = question("p", ("Anna", 3), ("Anna", 2))
    path = squad(tmp_path / "dev.json", GOOD, BAD, partly)
    reading = read(task("squad", bad_answers=0.5), path)
    assert [(e.id, e.answers) for e in reading.examples] == [
        ("a", (Answer("Anna", 2),)),
        ("p", (Answer("Anna", 2),)),
    ]
    assert reading.notes == (
        f"{path}: 2 of 4 answers do not stand at their answer_start: left out, and 1 question that has no other "
        "passed over (questions b, p)",
    )
    # 2 of 4 is the most that 0.5 allows.
    for part in PARTS:
        told = refusal(task("squad", bad_answers=0.49), path, part=part)
        assert told.startswith(
            f"{path}: 2 of 4 answers do not stand at their answer_start (questions b, p), more than "
        )


@pytest.mark.parametrize("part", ["validation", "test"])
def test_what_is_measured_keeps_all_questions_and_the_texts_of_all_answers(part, tmp_path):
    """The evaluation scripts of SQuAD read no places, and count every question of the file."""
    partly = question("p", ("Anna", 3), ("Anna", 2))
    path = squad(tmp_path / "dev.json", GOOD, BAD, partly)
    reading = read(task("squad", bad_answers=0.5), path, part=part)
    assert [(e.id, e.answers, e.is_labelled) for e in reading.examples] == [
        ("a", (Answer("Anna", 2),), True),
        ("b", (Answer("Bo", UNKNOWN_PLACE),), True),
        ("p", (Answer("Anna", UNKNOWN_PLACE), Answer("Anna", 2)), True),
    ]
    assert reading.notes == (
        f"{path}: 2 of 4 answers do not stand at their answer_start: kept, to measure by the text, and 1 "
        "question that has no other left out of the loss (questions b, p)",
    )


def test_a_single_answer_and_a_single_question_are_told_as_such(tmp_path):
    path = squad(tmp_path / "dev.json", GOOD, BAD, NONE)
    assert read(task("squad", bad_answers=0.5, unanswerable=False), path).notes == (
        f"{path}: 1 of 2 answers does not stand at its answer_start: left out, and 1 question that has no other "
        "passed over (question b)",
        f"{path}: 1 question without an answer passed over, by task.unanswerable",
    )


def test_the_first_bad_questions_are_named(tmp_path):
    bad = [question(f"b{n}", ("Bo", 0), ("Bo", 1)) for n in range(7)]
    told = refusal("squad", squad(tmp_path / "dev.json", *bad))
    assert "14 of 14 answers" in told
    assert "(questions b0, b1, b2, b3, b4, ...)" in told


@pytest.mark.parametrize(
    "answer", [("Bo", 10), ("Bo", -12), ("", 3), ("bo", 11), ("Rome. later", 17), ("Rome", 99)]
)
def test_an_answer_stands_at_its_place_or_not(answer, tmp_path):
    path = squad(tmp_path / "dev.json", GOOD, question("x", answer))
    known = task("squad", bad_answers=0.5)
    assert [e.id for e in read(known, path).examples] == ["a"]
    _, kept = read(known, path, part="validation").examples
    assert kept.answers == (Answer(answer[0], UNKNOWN_PLACE),)


def test_a_question_to_predict_is_kept_whatever_its_answers_are(tmp_path):
    path = squad(tmp_path / "test.json", GOOD, BAD, {"id": "c", "question": "Where?"})
    reading = read(task("squad", bad_answers=0.5), path, part="test")
    assert [(e.id, e.is_labelled) for e in reading.examples] == [("a", True), ("b", True), ("c", False)]


def test_no_answer_is_what_the_file_or_the_setting_says(tmp_path):
    path = squad(tmp_path / "dev.json", GOOD, NONE)
    for unanswerable in (None, True):
        _, none = read(task("squad", unanswerable=unanswerable), path).examples
        assert (none.answers, none.is_labelled) == ((), True)
    bare = squad(tmp_path / "bare.json", GOOD, question("n"))
    assert [e.answers for e in read(task("squad", unanswerable=True), bare).examples] == [(Answer("Anna", 2),), ()]
    for unanswerable in (None, False):
        told = refusal(task("squad", unanswerable=unanswerable), bare)
        assert told.startswith(f"{bare}: question n: has no answer, and is_impossible is not true;")


def test_a_question_without_text_is_kept_and_told(tmp_path):
    path = squad(tmp_path / "dev.json", GOOD, question("e", ("Anna", 2), question=" "))
    reading = read("squad", path)
    assert [e.question for e in reading.examples] == ["Who?", " "]
    assert reading.notes == (f"{path}: 1 question without text, kept as it is",)


def test_several_files_are_groups(tmp_path):
    paths = [squad(tmp_path / f"{name}.json", question(name, ("Anna", 2))) for name in ("one", "two")]
    assert [(e.group, e.id) for e in read("squad", *paths).examples] == [("one", "one"), ("two", "two")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [\n{"paragraphs": [}]}', ":2: not JSON (Expecting value, column 17)"),
        ("[]", ": the file: must be an object with a list 'data', not []"),
        ('{"data": [3]}', ": the file: data[0] must be an object, but it is 3"),
        ('{"data": [{}]}', ": data[0]: must be an object with a list 'paragraphs'"),
        (
            '{"data": [{"paragraphs": [{"qas": []}]}]}',
            ": data[0].paragraphs[0]: 'context' must be a text, but it is missing",
        ),
        (
            '{"data": [{"paragraphs": [{"qas": [], "context": " "}]}]}',
            ": data[0].paragraphs[0]: the context is empty",
        ),
        (
            '{"data": [{"paragraphs": [{"qas": [{}], "context": "c"}]}]}',
            ": data[0].paragraphs[0].qas[0]: 'id' must be a text",
        ),
        ('{"data": []}', ": has no example of the task"),
    ],
)
def test_what_is_no_squad_is_refused_with_its_place(content, message, tmp_path):
    path = write(tmp_path / "dev.json", content)
    assert refusal("squad", path).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (question("x", ("Anna", "2")), "question x: answer_start must be a whole number, but it is '2'"),
        (question("x", ("Anna", True)), "question x: answer_start must be a whole number, but it is True"),
        (question("x", (5, 2)), "question x: 'text' must be a text, but it is 5"),
        (
            question("x", ("Anna", 2), is_impossible=True),
            "question x: is_impossible is true, but it has 1 answer",
        ),
        (
            question("x", ("Anna", 2), is_impossible="no"),
            "question x: is_impossible must be true or false, but it is 'no'",
        ),
        (
            question("x", ("Anna", 2), question=None),
            "question x: 'question' must be a text, but it is missing or null",
        ),
        (GOOD, "question a: the id 'a' is also that of "),
    ],
)
def test_a_bad_question_is_refused_with_its_id(bad, message, tmp_path):
    path = squad(tmp_path / "dev.json", GOOD, bad)
    assert refusal("squad", path).startswith(f"{path}: {message}")


@pytest.mark.parametrize(("known", "labelled"), [(False, [False, False]), (True, [True, True])])
def test_empty_lists_of_a_test_file_say_something_where_any_question_has_an_answer(tmp_path, known, labelled):
    first = [{"text": "a", "answer_start": 0}] if known else []
    questions = [{"id": "1", "question": "q", "answers": first}, {"id": "2", "question": "q", "answers": []}]
    content = {"data": [{"paragraphs": [{"context": "a b", "qas": questions}]}]}
    path = write(tmp_path / "test.json", json.dumps(content))
    reading = read(task("squad", unanswerable=True), path, part="test")
    assert [example.is_labelled for example in reading.examples] == labelled
