"""Tied and untied vocabularies: reading, setting and resizing them, as Hugging Face's suite does."""

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import logging

from tests.family.cases import ARCHITECTURES, MASKED
from tests.family.hugging_face import (
    BATCH,
    HIDDEN,
    SHAPES,
    VOCABULARY,
    WIDTH,
    WITH_VOCABULARY_HEAD,
    inputs_of,
    labels_of,
    make,
)
from tests.family.passes import all_outputs, objective_of
from tests.golden.formula import uniform
from tests.sources import assert_none

logging.disable_progress_bar()
BIGGER, SMALLER = VOCABULARY + 10, VOCABULARY - 15
BIAS, WORDS, DECODER = (
    "cls.predictions.bias",
    "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.weight",
)
LOGITS = {name: next(iter(SHAPES[name])) for name in WITH_VOCABULARY_HEAD}
each_class = pytest.mark.parametrize("architecture", ARCHITECTURES)
each_head = pytest.mark.parametrize("architecture", WITH_VOCABULARY_HEAD)
each_tie = pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
each_number = pytest.mark.parametrize("number", [BIGGER, SMALLER])


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {part.name: part.view(part.parameter.detach()).clone() for part in model.parts()}


def fill_biases_(model: nn.Module) -> None:
    """Values that a resize could lose: biases start at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in model.parts():
            if part.name.endswith("bias"):
                view = part.view(part.parameter)
                view.copy_(torch.randn(view.shape, generator=generator))


@each_head
def test_tied_decoder_follows_the_word_embeddings(architecture):
    model, inputs, name = make(architecture), inputs_of(architecture), LOGITS[architecture]
    del inputs["input_ids"]
    inputs["inputs_embeds"] = uniform("embedded", (BATCH, WIDTH, HIDDEN)).float()
    before = all_outputs(model(**inputs))[name]
    with torch.no_grad():
        model.get_input_embeddings().weight[5] *= 3
    after = all_outputs(model(**inputs))[name]
    others = torch.arange(VOCABULARY) != 5
    assert torch.equal(after[..., others], before[..., others])
    # Sums of 64 products up to 1 in float32.
    assert (after[..., 5] - 3 * before[..., 5]).abs().max() < 1e-5


@each_head
@each_tie
def test_a_tied_decoder_is_the_same_parameter_and_an_untied_one_is_not(architecture, is_tied):
    """So that an optimizer sees one leaf, which torch lists once."""
    model = make(architecture, tie_word_embeddings=is_tied)
    words, decoder = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (words is decoder) is is_tied
    assert (words.data_ptr() == decoder.data_ptr()) is is_tied


@each_head
def test_files_leave_tied_tensors_out_and_keep_untied_ones(architecture, tmp_path):
    for is_tied in (True, False):
        make(architecture, tie_word_embeddings=is_tied).save_pretrained(tmp_path / str(is_tied))
        with safe_open(tmp_path / str(is_tied) / "model.safetensors", framework="pt") as file:
            names = set(file.keys())
        assert BIAS in names
        assert (DECODER in names) is not is_tied


@each_class
def test_only_classes_with_a_vocabulary_head_have_output_embeddings(architecture):
    model = make(architecture)
    assert (model.get_output_embeddings() is not None) is (architecture in WITH_VOCABULARY_HEAD)


@each_class
def test_input_embeddings_may_be_exchanged(architecture):
    one, other = make(architecture), make(architecture)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(2)
    inputs = inputs_of(architecture)
    ids = inputs["input_ids"].reshape(-1, inputs["input_ids"].shape[-1])
    one.set_input_embeddings(other.get_input_embeddings())
    assert torch.equal(one.get_input_embeddings()(ids), other.get_input_embeddings()(ids))
    assert all(value.isfinite().all() for value in all_outputs(one(**inputs)).values())


# Resizing


@each_class
@each_number
def test_resizing_keeps_the_old_rows_and_changes_every_size(architecture, number):
    model = make(architecture)
    fill_biases_(model)
    before = tensors_of(model)
    model.resize_token_embeddings(number)
    after, kept = tensors_of(model), min(number, VOCABULARY)
    assert model.config.vocab_size == number
    assert after.keys() == before.keys()
    for name, value in after.items():
        if name in (WORDS, DECODER, BIAS):
            assert value.shape[0] == number
            assert torch.equal(value[:kept], before[name][:kept]), name
        else:
            assert torch.equal(value, before[name]), name


@each_head
@each_tie
@each_number
def test_a_resized_model_computes_trains_and_saves(architecture, is_tied, number, tmp_path):
    model = make(architecture, tie_word_embeddings=is_tied)
    fill_biases_(model)
    model.resize_token_embeddings(number)
    inputs, labels = inputs_of(architecture), labels_of(architecture)
    inputs["input_ids"] = inputs["input_ids"].clamp(max=number - 1)
    labels["labels"] = labels["labels"].clamp(max=number - 1)
    inputs["input_ids"][0, 2] = number - 1
    output = model(**inputs, **labels)
    name = LOGITS[architecture]
    assert all_outputs(output)[name].shape[-1] == number
    objective_of(output).backward()
    assert_none(part.name for part in model.parts() if part.parameter.grad is None)
    model.save_pretrained(tmp_path)
    theirs, told = getattr(transformers, architecture).from_pretrained(tmp_path, output_loading_info=True)
    assert {key: list(value) for key, value in told.items() if value} == {}
    expected = all_outputs(theirs(**inputs))[name]
    assert (all_outputs(output)[name] - expected).abs().max() < 1e-5


@each_head
@each_tie
def test_old_words_keep_their_logits(architecture, is_tied):
    model, inputs = make(architecture, tie_word_embeddings=is_tied), inputs_of(architecture)
    fill_biases_(model)
    name = LOGITS[architecture]
    before = all_outputs(model(**inputs))[name]
    model.resize_token_embeddings(BIGGER)
    after = all_outputs(model(**inputs))[name][..., :VOCABULARY]
    # Another number of columns may be another kernel.
    assert (after - before).abs().max() < 1e-6


def test_resizing_to_no_number_changes_nothing_and_gives_the_embeddings():
    model = make(MASKED)
    before = tensors_of(model)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.resize_token_embeddings(VOCABULARY) is model.get_input_embeddings()
    assert all(torch.equal(value, before[name]) for name, value in tensors_of(model).items())


@each_head
def test_a_frozen_vocabulary_stays_frozen(architecture):
    model = make(architecture)
    model.get_input_embeddings().weight.requires_grad_(False)
    model.resize_token_embeddings(BIGGER)
    assert not model.get_input_embeddings().weight.requires_grad
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_padding_row_still_gets_no_gradient_from_its_lookup():
    model, inputs = make(MASKED, tie_word_embeddings=False), inputs_of(MASKED)
    model.resize_token_embeddings(BIGGER)
    inputs["input_ids"][:, 0] = 0
    objective_of(model(**inputs, **labels_of(MASKED))).backward()
    (part,) = (part for part in model.parts() if part.name == WORDS)
    gradient = part.view(part.parameter.grad)
    assert not gradient[0].any()
    assert gradient[1:VOCABULARY].any()


def test_ids_past_a_smaller_vocabulary_are_refused():
    model, inputs = make(MASKED), inputs_of(MASKED)
    model.resize_token_embeddings(SMALLER)
    inputs["input_ids"][3, 3] = SMALLER
    with pytest.raises(Exception, match=f"from 0 to {SMALLER - 1}"):
        model(**inputs)
