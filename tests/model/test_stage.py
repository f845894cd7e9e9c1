"""A sample's result depends on the sample alone, with dropout on: not on its neighbours nor on the padding."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.parallel.mesh import ParallelMesh
from tests.support import ODD_SHAPE, Recipe, build_stage, make_batch, with_dropout

RECIPE = Recipe(shape=with_dropout(ODD_SHAPE))


@pytest.fixture(scope="module")
def stage() -> MegatronBertStage:
    return build_stage(RECIPE, ParallelMesh.alone())


def padded(batch, width):
    """The one sample of a batch without padding, with padding."""
    extra = (0, width - batch.input_ids.shape[1])
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, extra),
        token_type_ids=F.pad(batch.token_type_ids, extra),
        attention_mask=(torch.arange(width) < batch.input_ids.shape[1])[None],
    )


def alone(batch, row):
    """One row as a batch of its own, every position of it masked."""
    attention_mask = None if batch.attention_mask is None else batch.attention_mask[row : row + 1]
    return replace(
        batch,
        input_ids=batch.input_ids[row : row + 1],
        token_type_ids=batch.token_type_ids[row : row + 1],
        attention_mask=attention_mask,
        sample_numbers=batch.sample_numbers[row : row + 1],
        masked_positions=torch.arange(batch.input_ids.shape[1]),
    )


def every_position(batch):
    return replace(batch, masked_positions=torch.arange(batch.input_ids.numel()))


@pytest.mark.parametrize("width", [9, 16, 24])
def test_more_padding_changes_nothing_with_dropout_on(stage, width):
    """Sums over zeros more: some units in the last place."""
    batch = make_batch((8,), shape=RECIPE.shape, first_sample=3, seed=1)
    batch = replace(batch, masked_positions=torch.arange(8))
    found, truth = stage(None, padded(batch, width)), stage(None, batch)
    torch.testing.assert_close(found.masked, truth.masked, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found.next_sentence, truth.next_sentence, rtol=1e-11, atol=1e-12)


def test_a_sample_gives_the_same_alone_and_in_a_batch_with_dropout_on(stage):
    batch = make_batch((13, 9, 11), shape=RECIPE.shape, first_sample=3, seed=1)
    whole = stage(None, every_position(batch))
    for row in range(3):
        found = stage(None, alone(batch, row))
        expected = whole.masked.view(3, 13, -1)[row]
        torch.testing.assert_close(found.masked, expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(found.next_sentence[0], whole.next_sentence[row], rtol=1e-11, atol=1e-12)


def test_dropout_is_on_in_training_and_off_in_evaluation(stage):
    batch = make_batch((13, 9), shape=RECIPE.shape, first_sample=3, seed=1)
    first, again = stage(None, batch), stage(None, batch)
    evaluated = stage.eval()(None, batch)
    stage.train()
    assert torch.equal(first.masked, again.masked)
    assert not torch.equal(first.masked, evaluated.masked)
