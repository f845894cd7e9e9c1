"""Losses as documented, at the edges: batches without a label, parts of a sum, and which problem is meant."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.utils import logging

import megatron_bert_tp
from megatron_bert_tp.errors import ArgumentError, ConfigError
from tests.family.cases import ANSWERING, CAUSAL, CLASSIFICATION, MASKED, PRETRAINING
from tests.family.hugging_face import (
    BATCH,
    LABELS,
    TOKEN,
    VOCABULARY,
    WIDTH,
    inputs_of,
    labels_of,
    make,
    settings_of,
)
from tests.family.losses import loss_and_gradients, parts_of_loss
from tests.family.passes import on_ranks
from tests.golden.formula import integers, uniform
from tests.support import IGNORED

logging.disable_progress_bar()
NOTHING = torch.full((BATCH, WIDTH), IGNORED)
BEYOND = torch.full((BATCH,), WIDTH)
UNLABELLED: dict[str, dict[str, Tensor]] = {
    MASKED: {"labels": NOTHING},
    CAUSAL: {"labels": NOTHING},
    TOKEN: {"labels": NOTHING},
    ANSWERING: {"start_positions": BEYOND, "end_positions": BEYOND + 30},
}
SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    """Models of `transformers` that any size divides."""
    folder = tmp_path_factory.mktemp("losses")
    torch.manual_seed(0)
    for name in (*UNLABELLED, PRETRAINING):
        config = transformers.MegatronBertConfig(**settings_of(name, intermediate_size=36, initializer_range=0.2))
        getattr(transformers, name)(config).double().save_pretrained(folder / name)
    return {name: folder / name for name in (*UNLABELLED, PRETRAINING)}


# A batch without labels


@pytest.mark.parametrize("architecture", UNLABELLED)
@pytest.mark.parametrize("size", SIZES)
def test_a_batch_without_labels_costs_nothing_and_teaches_nothing(ranks, directories, architecture, size):
    """Hugging Face divides by the number of labels and gives no number."""
    arguments = inputs_of(architecture) | UNLABELLED[architecture]
    answers = on_ranks(ranks, size, loss_and_gradients, architecture, directories[architecture], arguments)
    for loss, gradients in answers:
        assert loss == 0
        assert [name for name, gradient in gradients.items() if gradient.any()] == []


def test_labels_that_shifting_drops_are_none():
    """The first token of a sequence has nothing before it that could tell it."""
    labels = NOTHING.clone()
    labels[:, 0] = 7
    assert make(CAUSAL)(**inputs_of(CAUSAL), labels=labels).loss == 0


def test_answers_count_one_by_one():
    """Where all starts lie beyond the sequence the ends alone are left, and the mean is still of two."""
    model, inputs = make(ANSWERING), inputs_of(ANSWERING)
    ends = torch.arange(BATCH) % WIDTH
    output = model(**inputs, start_positions=BEYOND, end_positions=ends)
    expected = F.cross_entropy(output.end_logits, ends) / 2
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_positions_may_come_as_a_column():
    model, inputs = make(ANSWERING), inputs_of(ANSWERING)
    labels = labels_of(ANSWERING)
    columns = {name: value[:, None] for name, value in labels.items()}
    assert torch.equal(model(**inputs, **columns).loss, model(**inputs, **labels).loss)


@pytest.mark.parametrize("given", ["start_positions", "end_positions"])
def test_one_end_of_an_answer_is_refused(given):
    """Hugging Face silently gives no loss."""
    with pytest.raises(ArgumentError, match="start_positions and end_positions"):
        make(ANSWERING)(**inputs_of(ANSWERING), **{given: labels_of(ANSWERING)[given]})


# The two parts of pretraining


@pytest.mark.parametrize("size", SIZES)
def test_parts_of_the_pretraining_loss_are_those_of_the_logits_and_add_up(ranks, directories, size):
    labels = labels_of(PRETRAINING)
    labels["labels"] = labels["labels"].masked_fill(integers("hidden", (BATCH, WIDTH), low=0, high=2) > 0, IGNORED)
    arguments = {**inputs_of(PRETRAINING), **labels}
    theirs = transformers.MegatronBertForPreTraining.from_pretrained(directories[PRETRAINING], dtype=torch.float64)
    expected = theirs(**arguments)
    words = F.cross_entropy(expected.prediction_logits.flatten(0, 1), labels["labels"].flatten())
    pairs = F.cross_entropy(expected.seq_relationship_logits, labels["next_sentence_label"])
    for found in on_ranks(ranks, size, parts_of_loss, directories[PRETRAINING], arguments):
        assert found == pytest.approx([expected.loss.item(), words.item(), pairs.item()], rel=1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_pairs_are_learned_from_a_batch_without_masked_words(ranks, directories, size):
    arguments = {**inputs_of(PRETRAINING), **labels_of(PRETRAINING), "labels": NOTHING}
    for loss, words, pairs in on_ranks(ranks, size, parts_of_loss, directories[PRETRAINING], arguments):
        assert words == 0
        assert loss == pairs > 0


def test_one_kind_of_label_gives_its_part_as_the_loss():
    """Hugging Face silently gives none."""
    model, inputs, labels = make(PRETRAINING), inputs_of(PRETRAINING), labels_of(PRETRAINING)
    both = model(**inputs, **labels)
    words = model(**inputs, labels=labels["labels"])
    pairs = model(**inputs, next_sentence_label=labels["next_sentence_label"])
    assert words.next_sentence_loss is pairs.masked_lm_loss is None
    assert words.loss.equal(both.masked_lm_loss)
    assert words.masked_lm_loss.equal(both.masked_lm_loss)
    assert pairs.loss.equal(both.next_sentence_loss)
    assert pairs.next_sentence_loss.equal(both.next_sentence_loss)


# Which problem a classification is

CLASSES = torch.arange(BATCH) % LABELS
TARGETS = uniform("losses", (BATCH, LABELS), low=0, high=1).round().float()
NUMBERS = uniform("numbers", (BATCH,)).float()
PROBLEMS = [
    ({"num_labels": 1}, NUMBERS, "regression"),
    ({"num_labels": 1}, NUMBERS[:, None], "regression"),
    ({"num_labels": 1}, CLASSES.float(), "regression"),
    ({}, CLASSES, "single_label_classification"),
    ({}, CLASSES[:, None], "single_label_classification"),
    ({}, TARGETS, "multi_label_classification"),
    ({"problem_type": "regression"}, TARGETS, "regression"),
    ({"problem_type": "single_label_classification"}, CLASSES, "single_label_classification"),
]


@pytest.mark.parametrize(("settings", "labels", "problem"), PROBLEMS)
def test_the_problem_follows_from_settings_then_number_then_dtype(settings, labels, problem, tmp_path):
    """And is kept in the settings from the first batch on, with the loss that `transformers` has for it."""
    config = transformers.MegatronBertConfig(**settings_of(CLASSIFICATION, **settings))
    theirs = transformers.MegatronBertForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = megatron_bert_tp.MegatronBertForSequenceClassification.from_pretrained(tmp_path)
    losses = [model(**inputs_of(CLASSIFICATION), labels=labels).loss.item() for model in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert ours.config.problem_type == theirs.config.problem_type == problem


def test_an_unknown_problem_is_refused():
    """Hugging Face silently gives no loss."""
    with pytest.raises(ConfigError, match="problem_type"):
        make(CLASSIFICATION, problem_type="ranking")


@pytest.mark.parametrize("label", [VOCABULARY, -1])
def test_labels_outside_the_vocabulary_are_refused(label):
    """The rows that pad the vocabulary are no words, and no rank answers for them."""
    labels = labels_of(MASKED)["labels"].clone()
    labels[2, 2] = label
    with pytest.raises(ArgumentError, match=f"{label}; a label is from 0 to {VOCABULARY - 1}"):
        make(MASKED)(**inputs_of(MASKED), labels=labels)
