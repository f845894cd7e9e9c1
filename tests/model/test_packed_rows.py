"""Packed rows against the same samples in rows of their own: outputs and gradients in float64, dropout on."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.model.initialisation import initialise_
from megatron_bert_tp.model.segments import Segments
from megatron_bert_tp.model.shape import HEADS, PRETRAINING, Head, ModelShape
from megatron_bert_tp.model.stage import MegatronBertStage, PretrainingLogits
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.random_bits import Place, RandomBits
from megatron_bert_tp.pipeline.partition import partition
from tests.model.stages import packed
from tests.support import ODD_SHAPE, make_batch, with_dropout

# Longer than what lengths are rounded up to, so that there are several groups, with padding and without.
SHAPE = replace(ODD_SHAPE, max_position_embeddings=80, vocab_size=103, num_hidden_layers=2)
LENGTHS = (64, 7, 33, 64, 80, 31, 32, 9)
SHAPES = {
    "dropout": with_dropout(SHAPE),
    "no-dropout": with_dropout(SHAPE, 0.0),
    "attention-dropout-alone": replace(with_dropout(SHAPE, 0.0), attention_probs_dropout_prob=0.1),
    "distances": replace(with_dropout(SHAPE), position_embedding_type="relative_key_query"),
    "causal": replace(with_dropout(SHAPE), is_decoder=True),
}
# Sums of some hundred numbers near 1 in another order, in float64.
EXACT = 1e-12


def built(shape: ModelShape, head: Head = PRETRAINING) -> MegatronBertStage:
    (plan,) = partition(shape.num_hidden_layers, 1)
    stage = MegatronBertStage(shape, plan, axis=Axis.alone("tensor"), head=head, seed=3, dtype=torch.float64)
    initialise_(stage, seed=5)
    return stage.train()


def values_of(output: Tensor | PretrainingLogits, lengths: tuple[int, ...]) -> list[Tensor]:
    """What the head gives, without what it gives for padding: ``[batch, sequence, ...]`` as a list of tokens."""
    if isinstance(output, PretrainingLogits):
        return [output.masked, output.next_sentence]
    if output.dim() < 3:
        return [output]
    if len(output) == 1:
        return [output[0, : sum(lengths)]]
    return [torch.cat([row[:length] for row, length in zip(output, lengths, strict=True)])]


def outputs_and_gradients(stage: MegatronBertStage, batch: Batch, lengths: tuple[int, ...]) -> list[Tensor]:
    stage.zero_grad()
    values = values_of(stage(None, batch), lengths)
    draws = torch.Generator().manual_seed(1)
    weights = [torch.randn(value.shape, generator=draws, dtype=torch.float64) for value in values]
    torch.autograd.backward(values, weights)
    gradients = [parameter.grad for parameter in stage.parameters() if parameter.grad is not None]
    assert len(gradients) > 10
    return [*(value.detach() for value in values), *(gradient.clone() for gradient in gradients)]


def assert_packing_changes_nothing(shape: ModelShape, head: Head, lengths: tuple[int, ...], padding: int) -> None:
    stage = built(shape, head)
    batch = make_batch(lengths, shape=shape, first_sample=40, seed=2)
    truth = outputs_and_gradients(stage, batch, lengths)
    found = outputs_and_gradients(stage, packed(batch, lengths, padding=padding), lengths)
    for ours, theirs in zip(found, truth, strict=True):
        assert theirs.abs().max() > 0
        assert (ours - theirs).abs().max() <= EXACT * max(1.0, theirs.abs().max().item())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("padding", [0, 5])
def test_packed_samples_give_what_they_give_alone(name, padding):
    assert_packing_changes_nothing(SHAPES[name], PRETRAINING, LENGTHS, padding)


@pytest.mark.parametrize("lengths", [(40,), (80, 80), (16, 16, 16), (5, 6, 7)])
def test_rows_of_one_group_or_one_sample_are_packed_too(lengths):
    assert_packing_changes_nothing(SHAPES["dropout"], PRETRAINING, lengths, 3)


@pytest.mark.parametrize("name", [name for name in HEADS if name != "MegatronBertForMultipleChoice"])
def test_every_head_reads_packed_rows(name):
    shape = replace(SHAPES["dropout"], num_labels=3)
    assert_packing_changes_nothing(shape, HEADS[name], LENGTHS, 2)


def test_changing_one_sample_of_a_packed_row_changes_no_other():
    stage = built(SHAPES["dropout"], HEADS["MegatronBertModel"])
    batch = packed(make_batch(LENGTHS, shape=SHAPE, first_sample=0, seed=2), LENGTHS, padding=4)
    before = stage(None, batch)
    ids = batch.input_ids.clone()
    second = slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
    ids[0, second] = (ids[0, second] + 1) % SHAPE.vocab_size
    after = stage(None, replace(batch, input_ids=ids))
    changed = (before != after).any(-1)[0]
    assert changed[second].all()
    assert not changed[: second.start].any()
    assert not changed[second.stop : sum(LENGTHS)].any()


def test_segments_say_where_samples_begin_and_waste_less_than_32_positions_each():
    segments = Segments.of(LENGTHS, is_causal=False, like=torch.zeros(1, sum(LENGTHS), 1))
    assert segments.firsts.tolist() == [0, 64, 71, 104, 168, 248, 279, 311]
    assert [(group.samples, group.length) for group in segments.groups] == [
        ((4,), 80), ((0, 2, 3), 64), ((1, 5, 6, 7), 32)
    ]
    # A row of like samples needs no mask: torch's faster attention takes none.
    assert [group.mask is None for group in segments.groups] == [True, False, False]


def test_tokens_come_back_from_their_slots_and_padding_gets_no_gradient():
    row = torch.arange(1.0, 331.0, dtype=torch.float64).view(1, 330, 1).requires_grad_()
    segments = Segments.of(LENGTHS, is_causal=False, like=row)
    parts = segments.spread(row)
    assert [tuple(part.shape) for part in parts] == [(1, 80, 1), (3, 64, 1), (4, 32, 1)]
    assert parts[1][1, :33, 0].tolist() == list(range(72, 105))
    joined = segments.join([part * 2 for part in parts])
    assert torch.equal(joined[0, :320], 2 * row[0, :320])
    joined[0, :320].sum().backward()
    assert row.grad[0, :320].eq(2).all()
    assert row.grad[0, 320:].eq(0).all()


def test_dropout_of_a_packed_row_is_that_of_its_samples():
    bits = RandomBits(7, (4, 9, 2), (3, 5, 1))
    drawn = bits.hidden(1, Place.MLP_OUTPUT, positions=12, features=6)
    assert drawn.shape == (1, 12, 6)
    first = 0
    for sample, length in ((4, 3), (9, 5), (2, 1)):
        alone = RandomBits(7, (sample,)).hidden(1, Place.MLP_OUTPUT, positions=length, features=6)
        assert torch.equal(drawn[:, first : first + length], alone)
        first += length
    assert (drawn[:, 9:] == 32767).all()
    assert bits.of_samples((2, 0)) == RandomBits(7, (2, 4))
