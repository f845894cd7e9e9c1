"""`generate` against that of `transformers`, and its draws against the distribution that they come from."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import megatron_bert_tp
from megatron_bert_tp.errors import ArgumentError
from megatron_bert_tp.family.generation import Sampling, kept_words
from tests.family.cases import CAUSAL, ODD
from tests.family.generating import words_of
from tests.family.passes import on_ranks
from tests.family.reference import build
from tests.golden.formula import integers, uniform

SIZES = (1, 2, 4)
WIDTH, MORE = 5, 9
PROMPTS = integers("prompts", (4, WIDTH), low=1, high=ODD["vocab_size"])
# Rows of 5, 3, 1 and 4 words, padded in front.
HIDDEN = torch.arange(WIDTH) < torch.tensor([0, 2, 4, 1])[:, None]
PADDED = {"prompts": PROMPTS.masked_fill(HIDDEN, 0), "attention_mask": (~HIDDEN).long()}
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "max_new_tokens": MORE}


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    model = build(CAUSAL, {"is_decoder": True})
    with torch.no_grad():
        # Else the same few words follow each other for ever, and no cache could be wrong.
        for embedding in (model.bert.embeddings.word_embeddings, model.bert.embeddings.position_embeddings):
            embedding.weight.mul_(5)
        model.cls.predictions.bias.zero_()
        model.cls.predictions.transform.LayerNorm.bias.zero_()
    return model


@pytest.fixture(scope="module")
def directory(theirs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    theirs.save_pretrained(folder)
    return folder


def expected_of(model: nn.Module, prompts: Tensor, **settings: Any) -> Tensor:
    mask = settings.pop("attention_mask", torch.ones_like(prompts))
    return model.generate(prompts, attention_mask=mask, do_sample=False, pad_token_id=0, **settings)


@pytest.mark.parametrize("size", SIZES)
def test_greedy_words_are_those_of_transformers_with_and_without_a_cache(ranks, theirs, directory, size):
    expected = expected_of(theirs, PROMPTS, max_new_tokens=MORE)
    assert len(expected[:, WIDTH:].unique()) > 10, "words that say nothing about their order"
    settings = [{"max_new_tokens": MORE, "use_cache": cached} for cached in (True, False)]
    for answers in on_ranks(ranks, size, words_of, directory, PROMPTS, [*settings, {"max_length": WIDTH + MORE}]):
        assert all(torch.equal(found, expected) for found in answers)


@pytest.mark.parametrize("size", SIZES)
def test_prompts_padded_in_front_go_on_as_in_transformers(ranks, theirs, directory, size):
    mask = PADDED["attention_mask"]
    expected = expected_of(theirs, PADDED["prompts"], attention_mask=mask, max_new_tokens=MORE)
    settings = [{"max_new_tokens": MORE, "use_cache": cached, "attention_mask": mask} for cached in (True, False)]
    for answers in on_ranks(ranks, size, words_of, directory, PADDED["prompts"], settings):
        assert all(torch.equal(found, expected) for found in answers)


def test_padding_in_front_changes_no_words(directory):
    (together,) = words_of(
        1, directory, PADDED["prompts"], [{"max_new_tokens": MORE, "attention_mask": PADDED["attention_mask"]}]
    )
    for row, start in enumerate(HIDDEN.sum(1).tolist()):
        (alone,) = words_of(1, directory, PADDED["prompts"][row : row + 1, start:], [{"max_new_tokens": MORE}])
        assert torch.equal(alone[0], together[row, start:])


def test_a_sample_that_has_said_the_stop_word_is_filled_up(theirs, directory):
    free = expected_of(theirs, PROMPTS, max_new_tokens=MORE)
    stop = free[1, WIDTH + 3].item()
    expected = expected_of(theirs, PROMPTS, max_new_tokens=MORE, eos_token_id=stop)
    assert not expected.equal(free)
    (found,) = words_of(1, directory, PROMPTS, [{"max_new_tokens": MORE, "eos_token_id": stop}])
    assert torch.equal(found, expected)


def test_it_ends_early_when_all_samples_have_stopped(theirs, directory):
    free = expected_of(theirs, PROMPTS[:1], max_new_tokens=MORE)
    stop = free[0, WIDTH + 4].item()
    (found,) = words_of(1, directory, PROMPTS[:1], [{"max_new_tokens": MORE, "eos_token_id": stop}])
    first = (free[0, WIDTH:] == stop).nonzero()[0, 0].item()
    assert torch.equal(found[0], free[0, : WIDTH + first + 1])


def test_without_an_end_it_goes_on_to_the_last_position(directory):
    (found,) = words_of(1, directory, PROMPTS, [{}])
    assert found.shape == (4, ODD["max_position_embeddings"])


# Draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 2000])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 1.0])
def test_words_that_may_be_drawn_are_those_of_transformers(temperature, top_k, top_p):
    logits = uniform("logits", (6, 99), low=-6, high=6)
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
    expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    assert torch.equal(kept_words(logits, Sampling(temperature, top_k, top_p)), expected)


def test_words_are_drawn_as_often_as_their_probability_says(theirs, directory):
    """Each of the likely words within five standard errors."""
    num_draws = 20_000
    prompts = PROMPTS[:1].expand(num_draws, -1)
    settings = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 1}
    (found,) = words_of(1, directory, prompts, [settings])
    with torch.no_grad():
        probabilities = (theirs(PROMPTS[:1]).logits[0, -1] / 2.0).softmax(-1)
    shares = found[:, -1].bincount(minlength=ODD["vocab_size"]) / num_draws
    likely = probabilities > 0.002
    assert likely.sum() > 10
    errors = (probabilities * (1 - probabilities) / num_draws).sqrt()
    assert ((shares - probabilities).abs() < 5 * errors)[likely].all()


def test_draws_follow_from_the_seed_whatever_the_layout_and_the_cache(ranks, directory):
    settings = [{**SAMPLED, "seed": seed, "use_cache": cached} for seed in (3, 4) for cached in (True, False)]
    truth = words_of(1, directory, PROMPTS, settings)
    assert truth[0].equal(truth[1])
    assert truth[2].equal(truth[3])
    assert not truth[0].equal(truth[2])
    for answers in ranks.run(2, words_of, 2, directory, PROMPTS, settings):
        assert all(torch.equal(found, expected) for found, expected in zip(answers, truth, strict=True))


# What cannot be


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_length": 9, "max_new_tokens": 4}, "max_length or max_new_tokens"),
        ({"max_length": WIDTH}, "after the prompt"),
        ({"max_new_tokens": 400}, f"{ODD['max_position_embeddings']} positions"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"do_sample": True, "top_p": 0.0}, "top_p"),
        ({"do_sample": True, "top_k": -1}, "top_k"),
    ],
)
def test_settings_that_cannot_be_are_refused(directory, settings, told):
    with pytest.raises(ArgumentError, match=told):
        words_of(1, directory, PROMPTS, [settings])


def test_an_encoder_does_not_generate(directory):
    model = megatron_bert_tp.MegatronBertForCausalLM.from_pretrained(directory, is_decoder=False)
    with pytest.raises(ArgumentError, match="is_decoder"):
        model.generate(PROMPTS)


def test_dropout_is_no_way_to_sample(directory):
    model = megatron_bert_tp.MegatronBertForCausalLM.from_pretrained(directory).train()
    with pytest.raises(ArgumentError, match="eval"):
        model.generate(PROMPTS)


def test_an_encoder_of_another_length_is_looked_at_in_every_step(tmp_path):
    """Against words taken one by one from whole passes, whose numbers `tests/golden` checks."""
    settings = {**ODD, "is_decoder": True, "add_cross_attention": True, "initializer_range": 0.5}
    theirs = transformers.MegatronBertForCausalLM(transformers.MegatronBertConfig(**settings))
    theirs.double().save_pretrained(tmp_path)
    model = megatron_bert_tp.MegatronBertForCausalLM.from_pretrained(tmp_path)
    encoder = {
        "encoder_hidden_states": uniform("states", (4, 9, ODD["hidden_size"]), low=-3, high=3),
        "encoder_attention_mask": (torch.arange(9) < torch.tensor([9, 2, 5, 7])[:, None]).long(),
    }
    words = PROMPTS
    for _ in range(MORE):
        with torch.no_grad():
            last = model(words, **encoder, use_cache=False).logits[:, -1]
        words = torch.cat([words, last.argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(PROMPTS, max_new_tokens=MORE, **encoder), words)
    assert not torch.equal(model.generate(PROMPTS, max_new_tokens=MORE), words)
