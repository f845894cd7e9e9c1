"""Folders that the `datasets` library saved; its own writer makes them."""

import pytest

from tests.tasks.reading import read, refusal, task, write

datasets = pytest.importorskip("datasets")
CLASSES = datasets.ClassLabel(names=["bad", "good"])
TEXT = datasets.Value("string")


def save(path, columns, **features):
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(str(path))
    return path


def test_classes_become_names(tmp_path):
    path = save(tmp_path / "train", {"text": ["a", "b"], "label": [1, 0]}, text=TEXT, label=CLASSES)
    found = [(e.text, e.label, e.id, e.place) for e in read("classification", path).examples]
    assert found == [("a", "good", "0", f"{path}, row 0"), ("b", "bad", "1", f"{path}, row 1")]


def test_a_class_below_0_is_none(tmp_path):
    path = save(tmp_path / "test", {"text": ["a"], "label": [-1]}, text=TEXT, label=CLASSES)
    assert read("classification", path, part="test").examples[0].label is None
    assert refusal("classification", path).startswith(f"{path}, row 0: 'label' has no label")


def test_lists_of_classes_and_numbers(tmp_path):
    columns = {"text": ["a", "b"], "label": [[1, 0], []]}
    path = save(tmp_path / "train", columns, text=TEXT, label=datasets.Sequence(CLASSES))
    assert [e.label for e in read("multi-label", path).examples] == [("good", "bad"), ()]
    path = save(tmp_path / "numbers", {"text": ["a"], "label": [1.5]}, text=TEXT, label=datasets.Value("float64"))
    assert [e.label for e in read("regression", path).examples] == [1.5]


def test_more_rows_than_a_batch_and_other_columns(tmp_path):
    count = 2500
    columns = {
        "text": [f"t{n}" for n in range(count)],
        "label": [n % 2 for n in range(count)],
        "more": [0] * count,
    }
    path = tmp_path / "train"
    data = datasets.Dataset.from_dict(columns)
    data.with_format("numpy").save_to_disk(str(path), num_shards=3)
    assert [(e.text, e.label) for e in read("classification", path).examples] == [
        (f"t{n}", str(n % 2)) for n in range(count)
    ]


def test_choices_of_a_list(tmp_path):
    columns = {"text": ["Why?"], "options": [["a", "b"]], "label": [1]}
    path = save(
        tmp_path / "train", columns, text=TEXT, options=datasets.Sequence(TEXT), label=datasets.Value("int64")
    )
    (example,) = read(task("multiple-choice", columns={"choices": ("options",)}), path).examples
    assert (example.pairs, example.label) == ((("Why?", "a"), ("Why?", "b")), 1)


def test_glue_has_the_columns_of_the_hub(tmp_path):
    label = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
    columns = {"premise": ["A.", "C."], "hypothesis": ["B.", "D."], "label": [2, 1], "idx": [4, 5]}
    path = save(
        tmp_path / "validation_matched",
        columns,
        premise=TEXT,
        hypothesis=TEXT,
        label=label,
        idx=datasets.Value("int32"),
    )
    found = [(e.text, e.pair, e.label, e.id, e.group) for e in read("mnli", path).examples]
    assert found == [("A.", "B.", "contradiction", "4", "matched"), ("C.", "D.", "neutral", "5", "matched")]


def test_a_score_of_minus_1_is_none_and_any_other_beyond_the_scale_is_refused(tmp_path):
    def folder(name, *scores):
        columns = {"sentence1": ["A."] * len(scores), "sentence2": ["B."] * len(scores), "label": list(scores)}
        return save(tmp_path / name, columns, sentence1=TEXT, sentence2=TEXT, label=datasets.Value("float32"))

    path = folder("test", -1.0, 2.5)
    assert [e.label for e in read("sts-b", path, part="test").examples] == [None, 2.5]
    for part in ("training", "validation"):
        assert refusal("sts-b", path, part=part).startswith(f"{path}, row 0: 'label' has no label")
    path = folder("more", 0.0, 5.5)
    assert refusal("sts-b", path, part="test").startswith(
        f"{path}, row 1: the score 5.5 of 'label' is not from 0 to 5"
    )


def test_squad_has_the_columns_of_the_hub(tmp_path):
    answers = datasets.Sequence({"text": TEXT, "answer_start": datasets.Value("int32")})
    columns = {
        "id": ["x", "y"],
        "title": ["t", "t"],
        "context": ["Bo left."] * 2,
        "question": ["Who?", "When?"],
        "answers": [{"text": ["Bo", "Bo"], "answer_start": [0, 0]}, {"text": [], "answer_start": []}],
    }
    features = {"id": TEXT, "title": TEXT, "context": TEXT, "question": TEXT, "answers": answers}
    first, second = read("squad", path := save(tmp_path / "validation", columns, **features)).examples
    assert (first.id, first.context, [(a.text, a.start) for a in first.answers]) == (
        "x",
        "Bo left.",
        [("Bo", 0)] * 2,
    )
    assert (second.id, second.answers, second.is_labelled) == ("y", (), True)
    assert [e.is_labelled for e in read("squad", path, part="test").examples] == [True, True]
    hidden = {**columns, "answers": [{"text": [], "answer_start": []}] * 2}
    path = save(tmp_path / "test", hidden, **features)
    assert [e.is_labelled for e in read("squad", path, part="test").examples] == [False, False]


def test_words_and_tags_have_the_columns_of_the_hub(tmp_path):
    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "I-PER", "B-PER"]))
    columns = {"tokens": [["Bo", "Lee"], ["He"]], "ner_tags": [[1, 1], [0]], "pos_tags": [[5, 5], [6]]}
    path = save(
        tmp_path / "train",
        columns,
        tokens=datasets.Sequence(TEXT),
        ner_tags=tags,
        pos_tags=datasets.Sequence(datasets.Value("int64")),
    )
    found = [(e.words, e.tags, e.place) for e in read("token-classification", path).examples]
    assert found == [(("Bo", "Lee"), ("B-PER", "I-PER"), f"{path}, row 0"), (("He",), ("O",), f"{path}, row 1")]


def test_a_text_that_is_null_is_refused_with_its_row(tmp_path):
    columns = {"sentence1": ["a", None], "sentence2": ["b", "c"], "label": [0.5, 1.0]}
    path = save(tmp_path / "train", columns, sentence1=TEXT, sentence2=TEXT, label=datasets.Value("float64"))
    assert refusal("sts-b", path).startswith(
        f"{path}, row 1: 'sentence1' must be a text, but it is missing or null"
    )


def test_answers_of_another_shape_are_refused_with_their_row(tmp_path):
    texts = {"id": ["x"], "context": ["Bo left."], "question": ["Who?"]}
    features = dict.fromkeys([*texts, "answers"], TEXT)
    path = save(tmp_path / "train", {**texts, "answers": ["Bo"]}, **features)
    assert refusal("squad", path).startswith(f"{path}, row 0: 'answers' must be lists 'text' and 'answer_start'")


def test_what_cannot_be_read_is_told(tmp_path):
    path = save(tmp_path / "train", {"text": ["a"], "label": [1]}, text=TEXT, label=CLASSES)
    told = refusal(task("classification", columns={"text": "texts"}), path)
    assert told.startswith(f"{path}: the column 'texts' is missing; did you mean 'text'?")
    parts = tmp_path / "parts"
    datasets.DatasetDict({"a": datasets.load_from_disk(str(path))}).save_to_disk(str(parts))
    assert refusal("classification", parts) == f"{parts}: holds several parts; name one of them: {parts / 'a'}"
    write(path / "state.json", "{}")
    assert refusal("classification", path).startswith(f"{path}: datasets.load_from_disk cannot read this folder (")


def test_an_empty_folder_has_no_example(tmp_path):
    save(tmp_path / "empty", {"text": [], "label": []}, text=TEXT, label=CLASSES)
    assert f"{tmp_path}/empty: has no example of the task" in refusal("classification", tmp_path / "empty")


def test_hidden_tags_are_none(tmp_path):
    tags = {"tokens": [["a", "b"]], "ner_tags": [[-1, -1]]}
    words, classes = datasets.Sequence(TEXT), datasets.Sequence(datasets.ClassLabel(names=["O", "B-x"]))
    save(tmp_path / "test", tags, tokens=words, ner_tags=classes)
    (example,) = read("token-classification", tmp_path / "test", part="test").examples
    assert example.tags is None
