"""Split sequences against one process in float64, dropout on: losses and all gradients, at tensor 2 and 4.

The gradients of what works on the own tokens alone are summed here; training does it after the last microbatch.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from megatron_bert_tp.errors import LayoutError
from megatron_bert_tp.model.shape import HEADS
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.pipeline.partition import partition
from tests.comparison import is_key_bias, join, relative_errors
from tests.model.stages import (
    SMALL,
    Model,
    Result,
    Way,
    batches_of,
    built,
    kept_of,
    loss_of,
    pieces_of,
    run_all,
    sum_over_sequence_,
)
from tests.support import Layout, build_mesh, with_dropout

# Some hundred sums in another order, in float64.
EXACT = 1e-11
THREE_HEADS = replace(SMALL, hidden_size=12, num_attention_heads=3)
LABELLED = replace(with_dropout(SMALL), num_labels=3)
MODELS = {
    "dropout": Model(),
    "no dropout": Model(with_dropout(SMALL, 0.0)),
    "packed": Model(is_packed=True),
    "causal": Model(replace(with_dropout(SMALL), is_decoder=True)),
    "distances": Model(replace(with_dropout(SMALL), position_embedding_type="relative_key_query")),
    "packed distances": Model(
        replace(with_dropout(SMALL), position_embedding_type="relative_key"), is_packed=True
    ),
    "packed and causal": Model(replace(with_dropout(SMALL), is_decoder=True), is_packed=True),
    "[PAD] is another word": Model(replace(with_dropout(SMALL), pad_token_id=102)),
    **{name: Model(LABELLED, head) for name, head in HEADS.items() if name != "MegatronBertForPreTraining"},
    **{
        f"packed {name}": Model(LABELLED, HEADS[name], is_packed=True)
        for name in ("MegatronBertForTokenClassification", "MegatronBertForNextSentencePrediction")
    },
}
THREE = {
    "three heads": Model(with_dropout(THREE_HEADS)),
    "three heads, packed": Model(with_dropout(THREE_HEADS), is_packed=True),
}


def assert_follows(ranks, models, size):
    splitting = {name: (model, Way(tensor=size, splits_sequence=True)) for name, model in models.items()}
    answers = ranks.run(size, run_all, splitting)
    (truths,) = ranks.run(1, run_all, {name: (model, Way()) for name, model in models.items()})
    for name, truth in truths.items():
        assert_same([answer[name] for answer in answers], truth, name)


def assert_same(results: list[Result], truth: Result, name: str) -> None:
    for result in results:
        assert result.losses == pytest.approx(truth.losses, rel=EXACT), name
    expected = join(truth.gradients)
    found = join(piece for result in results for piece in result.gradients)
    assert len(expected) > 20
    errors = relative_errors(found, expected)
    assert {n: e for n, e in errors.items() if not is_key_bias(n) and not e <= EXACT} == {}, name


@pytest.mark.parametrize("size", [2, 4])
def test_split_sequences_follow_one_process(ranks, size):
    assert_follows(ranks, MODELS, size)


def test_three_ranks_follow_one_process(ranks):
    assert_follows(ranks, THREE, 3)


def run_two_stages(model: Model, way: Way) -> Result:
    """Both stages of a pipeline on each tensor rank, with what would be sent between them."""
    axis = build_mesh(Layout(tensor=way.tensor)).tensor
    first, last = (built(model, way, axis, plan) for plan in partition(model.shape.num_hidden_layers, 2))
    losses = []
    for batch in batches_of(model):
        sent = first(None, batch)
        assert tuple(sent.shape) == last.boundary_shape(batch) == first.boundary_shape(batch)
        received = sent.detach().requires_grad_()
        loss = loss_of(last, last(received, batch), batch)
        losses.append(loss.item())
        loss.backward()
        sent.backward(received.grad)
    for stage in (first, last):
        sum_over_sequence_(stage)
    return Result(losses, pieces_of(first) + pieces_of(last))


@pytest.mark.parametrize("name", ["dropout", "packed"])
def test_two_pipeline_stages_follow_one_process(ranks, name):
    model = MODELS[name]
    answers = ranks.run(2, run_two_stages, model, Way(tensor=2, splits_sequence=True))
    (truths,) = ranks.run(1, run_all, {name: (model, Way())})
    assert_same(answers, truths[name], name)


def kept_of_rank(size: int, *, splits_sequence: bool) -> list[int]:
    way = Way(tensor=size, splits_sequence=splits_sequence)
    return kept_of(Model(), way, build_mesh(Layout(tensor=size)).tensor)


def test_a_rank_keeps_no_hidden_states_of_other_ranks(ranks):
    """39 tokens, which are 20 each of two ranks."""
    whole, own = 39 * SMALL.hidden_size, 20 * SMALL.hidden_size
    for kept in ranks.run(2, partial(kept_of_rank, splits_sequence=False), 2):
        # Per layer two inputs and two outputs of LayerNorms, and two masks of dropout; two around the layers.
        assert kept.count(whole) == 6 * SMALL.num_hidden_layers + 2
    for kept in ranks.run(2, partial(kept_of_rank, splits_sequence=True), 2):
        assert kept.count(whole) == kept.count(40 * SMALL.hidden_size) == 0
        # The joined heads of all tokens have that size too, being half of all heads.
        assert kept.count(own) == 7 * SMALL.num_hidden_layers + 2


def test_one_rank_has_nothing_to_split():
    axis = Axis.alone("tensor")
    stage = built(Model(), Way(splits_sequence=True), axis)
    assert not stage.splits_sequence
    assert not any(getattr(layer, "splits_sequence", False) for layer in stage.modules())


def test_cross_attention_is_refused_and_says_what_to_do():
    shape = replace(SMALL, is_decoder=True, add_cross_attention=True)
    plan = partition(SMALL.num_hidden_layers, 1)[0]
    pair = Axis("tensor", (0, 1), 1)
    with pytest.raises(LayoutError, match=r"the tensor ranks \(2\); turn it off, or use a model without"):
        MegatronBertStage(shape, plan, axis=pair, splits_sequence=True)
    assert MegatronBertStage(shape, plan, axis=pair).splits_sequence is False


def test_gradients_of_the_own_tokens_are_those_of_layer_norms_positions_types_and_row_biases():
    stage = MegatronBertStage(SMALL, partition(3, 1)[0], axis=Axis("tensor", (0, 1), 1), splits_sequence=True)
    summed = {part.name for part in stage.parts() if part.over_sequence}
    layers = [f"bert.encoder.layer.{number}." for number in range(3)]
    in_layers = ("attention.ln.weight", "attention.ln.bias", "ln.weight", "ln.bias")
    biases = ("attention.output.dense.bias", "output.dense.bias")
    assert summed == {
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "bert.encoder.ln.weight",
        "bert.encoder.ln.bias",
        *(layer + name for layer in layers for name in in_layers + biases),
    }


def test_the_first_rank_of_two_keeps_half_of_the_hidden_states():
    stage = MegatronBertStage(SMALL, partition(3, 1)[0], axis=Axis("tensor", (0, 1), 0), splits_sequence=True)
    batch = type("Ids", (), {"input_ids": torch.zeros(3, 13, dtype=torch.long)})()
    assert stage.boundary_shape(batch) == (1, 20, SMALL.hidden_size)
