"""The models of Hugging Face's suite on two and four ranks: what is refused, and what moves between them."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers.utils import logging

from tests.family.cases import ARCHITECTURES, MASKED
from tests.family.hugging_face import SIZES, VOCABULARY, inputs_of, refused, settings_of
from tests.family.resizing import logits_before_and_after

logging.disable_progress_bar()
BIGGER, SMALLER = VOCABULARY + 10, VOCABULARY - 15


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_width_that_does_not_divide_is_refused_with_those_that_do(ranks, architecture):
    for told in ranks.run(2, refused, 2, architecture, settings_of(architecture)):
        assert "intermediate_size (37)" in told
        assert "sizes that work: 1, 37" in told


def test_heads_that_do_not_divide_are_refused_with_numbers_that_do(ranks):
    settings = {**SIZES, "intermediate_size": 36, "hidden_size": 66, "num_attention_heads": 3}
    for told in ranks.run(2, refused, 2, MASKED, settings):
        assert "num_attention_heads (3)" in told
        assert "sizes that work: 1, 3" in told


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resizing")
    config = transformers.MegatronBertConfig(**{**SIZES, "intermediate_size": 36})
    transformers.MegatronBertForMaskedLM(config).double().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("number", [BIGGER, SMALLER])
def test_sharded_rows_find_their_rank_again(ranks, directory, size, number):
    """Rows move between ranks, as each holds another share of another number."""
    theirs = transformers.MegatronBertForMaskedLM.from_pretrained(directory, dtype=torch.float64)
    inputs, kept = inputs_of(MASKED), min(number, VOCABULARY)
    inputs["input_ids"] = inputs["input_ids"].clamp(max=SMALLER - 1)
    expected = theirs(**inputs).logits.detach()
    for before, after in ranks.run(size, logits_before_and_after, size, directory, inputs, number):
        assert before.shape[-1] == VOCABULARY
        assert after.shape[-1] == number
        assert (before - expected).abs().max() < 1e-10
        assert (after[..., :kept] - expected[..., :kept]).abs().max() < 1e-10
