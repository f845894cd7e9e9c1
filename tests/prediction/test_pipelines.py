"""Answers are those of `transformers.pipeline` on the same directory."""

import itertools
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    MegatronBertForMultipleChoice,
    MegatronBertForNextSentencePrediction,
    MegatronBertForPreTraining,
    pipeline,
)

from tests.prediction.directories import ENTITIES, named, predict
from tests.prediction.texts import LONG, PAIRS, TEXTS

# Two float32 programs of the same two layers, rows padded in one of them.
TOLERANCE = 1e-5
SMALL_AND_REAL = pytest.mark.parametrize("vocabulary", ["uncased", "cased", "bert uncased", "bert cased"])
CLASSIFICATION = "MegatronBertForSequenceClassification"
TRUNCATED = {"truncation": True, "max_length": 160}


def assert_close(found: Any, expected: Any) -> None:
    """Equal but for the last digits of floats."""
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_close(found[key], expected[key])
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=TOLERANCE)
    else:
        assert found == expected


def plain(value: Any) -> Any:
    """Numbers of numpy as those of Python."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return value.item() if hasattr(value, "item") else value


@pytest.mark.parametrize(
    ("architecture", "vocabulary"),
    [
        ("MegatronBertForMaskedLM", "uncased"),
        ("MegatronBertForMaskedLM", "bert cased"),
        ("MegatronBertForPreTraining", "cased"),
        ("MegatronBertForPreTraining", "bert uncased"),
    ],
)
def test_filled_masks(directory_of, vocabulary, architecture):
    directory = directory_of(architecture, vocabulary)
    texts = [f"[MASK] {TEXTS[1]}", "the [MASK] was [MASK]ed, 東京[MASK]😀.", *(f"{text} [MASK]" for text in TEXTS)]
    fill = pipeline("fill-mask", model=str(directory), device="cpu", top_k=4)
    kept = ("token_str", "token", "score")
    for text, record in zip(texts, predict(directory, "fill-mask", texts, top=4), strict=True):
        rows = fill(text) if text.count("[MASK]") > 1 else [fill(text)]
        assert record["text"] == text
        assert_close(record["masks"], [[{key: word[key] for key in kept} for word in row] for row in rows])


def test_a_long_text_with_masks_is_cut_as_the_tokenizer_cuts_it(directory_of):
    directory = directory_of("MegatronBertForMaskedLM")
    (record,) = predict(directory, "fill-mask", [f"a [MASK] {LONG} [MASK]"])
    expected = pipeline("fill-mask", model=str(directory), device="cpu")(
        f"a [MASK] {LONG} [MASK]", tokenizer_kwargs=TRUNCATED
    )
    assert_close([[word["token"], word["score"]] for word in record["masks"][0]],
                 [[word["token"], word["score"]] for word in expected])  # fmt: skip
    assert len(record["masks"]) == 1
    assert record["truncated"]["read"] == 160 < 1000 < record["truncated"]["tokens"]


@pytest.mark.parametrize(
    ("vocabulary", "settings"),
    [
        ("uncased", {**named("a", "b", "c"), "problem_type": "multi_label_classification"}),
        ("cased", {**named("height", "weight"), "problem_type": "regression"}),
        ("uncased", {**named("similarity"), "problem_type": "regression"}),
        ("cased", {"num_labels": 1}),
        ("uncased", {"num_labels": 4, "problem_type": "single_label_classification"}),
        ("bert uncased", named("good", "bad", "neither")),
        ("bert cased", named("good", "bad", "neither")),
    ],
)
def test_classes(directory_of, vocabulary, settings):
    directory = directory_of(CLASSIFICATION, vocabulary, **settings)
    classify = pipeline("text-classification", model=str(directory), device="cpu", top_k=None)
    pairs = [{"text": one, "text_pair": other} for one, other in PAIRS]
    long_pair = {"text": LONG[:300], "text_pair": LONG}
    inputs = [*TEXTS, *pairs, LONG, long_pair]
    lines = [*TEXTS, *("\t".join(pair) for pair in PAIRS), LONG, long_pair]
    for given, record in zip(inputs, predict(directory, "classification", lines), strict=True):
        expected = classify(given, **TRUNCATED)
        assert_close(record["labels"], expected[0] if isinstance(given, str) else expected)
        assert ("truncated" in record) == (given in (LONG, long_pair))
    assert [len(each["labels"]) for each in predict(directory, "classification", TEXTS, top=1)] == [1] * len(TEXTS)


@SMALL_AND_REAL
@pytest.mark.parametrize("aggregation", ["simple", "none"])
def test_entities(directory_of, vocabulary, aggregation):
    directory = directory_of("MegatronBertForTokenClassification", vocabulary, **named(*ENTITIES))
    tell = pipeline("token-classification", model=str(directory), device="cpu", aggregation_strategy=aggregation)
    texts = [*TEXTS, "\u01c5 [UNK] [SEP] [MASK] ẞ", LONG]
    seen = set()
    for text, record in zip(texts, predict(directory, "ner", texts, aggregation=aggregation), strict=True):
        expected = [
            {("entity" if key == "entity_group" else key): value for key, value in plain(span).items()}
            for span in tell(text)
        ]
        assert_close(record["entities"], expected)
        seen |= {span["entity"] for span in record["entities"]}
    assert len(seen) >= 3
    assert record["truncated"]["read"] == 160


def test_an_entity_that_begins_ends_the_one_before(directory_of):
    directory = directory_of("MegatronBertForTokenClassification", **named("I-PER", "B-PER", "I-LOC"))
    tell = pipeline("token-classification", model=str(directory), device="cpu", aggregation_strategy="simple")
    neighbours = set()
    for text, record in zip(TEXTS, predict(directory, "ner", TEXTS), strict=True):
        spans = [(span["entity_group"], span["start"], span["end"]) for span in tell(text)]
        assert [(span["entity"], span["start"], span["end"]) for span in record["entities"]] == spans
        neighbours |= {(one[0], other[0]) for one, other in itertools.pairwise(spans)}
    assert neighbours >= {("PER", "PER"), ("PER", "LOC"), ("LOC", "PER")}


@pytest.mark.parametrize(
    ("architecture", "vocabulary"),
    [
        ("MegatronBertModel", "uncased"),
        ("MegatronBertForQuestionAnswering", "cased"),
        ("MegatronBertModel", "bert cased"),
    ],
)
def test_features(directory_of, vocabulary, architecture):
    directory = directory_of(architecture, vocabulary)
    extract = pipeline("feature-extraction", model=str(directory), device="cpu")
    texts = [*TEXTS, LONG]
    expected = [extract(text, truncation=True, tokenize_kwargs={"max_length": 160})[0] for text in texts]
    for pooling, pooled in {
        "none": expected,
        "mean": [torch.tensor(each).mean(0).tolist() for each in expected],
        "cls": [each[0] for each in expected],
    }.items():
        found = predict(directory, "features", texts, pooling=pooling)
        for record, states in zip(found, pooled, strict=True):
            torch.testing.assert_close(
                torch.tensor(record["features"]), torch.tensor(states), atol=5 * TOLERANCE, rtol=0
            )  # of states up to 10


@pytest.mark.parametrize("vocabulary", ["uncased", "cased"])
@pytest.mark.parametrize("architecture", [MegatronBertForNextSentencePrediction, MegatronBertForPreTraining])
def test_next_sentences(directory_of, vocabulary, architecture):
    directory = directory_of(architecture.__name__, vocabulary)
    tokenizer, model = AutoTokenizer.from_pretrained(directory), architecture.from_pretrained(directory).eval()
    pairs = [*PAIRS, (LONG, LONG[:200])]
    found = predict(directory, "next-sentence", ["\t".join(pair) for pair in pairs])
    for pair, record in zip(pairs, found, strict=True):
        with torch.no_grad():
            output = model(**tokenizer(*pair, return_tensors="pt", **TRUNCATED))
        logits = output.logits if "logits" in output else output.seq_relationship_logits
        assert record["follows"] == pytest.approx(logits.softmax(-1)[0, 0].item(), abs=TOLERANCE)


@pytest.mark.parametrize("vocabulary", ["uncased", "cased"])
def test_choices(directory_of, vocabulary):
    directory = directory_of("MegatronBertForMultipleChoice", vocabulary)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = MegatronBertForMultipleChoice.from_pretrained(directory).eval()
    questions = [(TEXTS[1], ["the river", "東京", TEXTS[5]]), ("x", ["y", "z"]), (LONG, ["the end", "finding"])]
    lines = [{"prompt": prompt, "choices": choices} for prompt, choices in questions]
    for (prompt, choices), record in zip(questions, predict(directory, "multiple-choice", lines), strict=True):
        encoded = tokenizer([prompt] * len(choices), choices, return_tensors="pt", padding=True, **TRUNCATED)
        with torch.no_grad():
            shares = model(**{name: rows[None] for name, rows in encoded.items()}).logits[0].softmax(-1)
        assert_close(record["scores"], shares.tolist())
        assert record["best"] == int(shares.argmax())
