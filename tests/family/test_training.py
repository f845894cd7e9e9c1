"""What training loops of users do with the classes: clip, mix precisions, copy, go on, share the gradient."""

import copy

import pytest
import torch
from torch import Tensor

from megatron_bert_tp import (
    MegatronBertConfig,
    MegatronBertForCausalLM,
    MegatronBertForMaskedLM,
    MegatronBertForPreTraining,
    MegatronBertForSequenceClassification,
)
from tests.comparison import gradient_pieces, join, weight_pieces
from tests.support import Layout, build_mesh

SIZES = {
    "vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 12, "initializer_range": 0.3,
}  # fmt: skip
IDS = torch.arange(10).view(2, 5)
LIMIT = 0.1


def clipped(tensor: int) -> tuple[float, list, list]:
    """Norm, clipped gradients and weights after three clipped steps, of one tensor rank."""
    mesh = build_mesh(Layout(tensor=tensor))
    model = MegatronBertForMaskedLM(MegatronBertConfig(**SIZES), mesh=mesh, dtype=torch.float64).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        norm = model.clip_grad_norm_(LIMIT)
        optimizer.step()
    parts = [part for part in model.parts() if part.alias_of is None]
    return norm, gradient_pieces(parts), weight_pieces(parts)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_clipping_takes_the_norm_of_the_whole_model(ranks, size):
    """And so replicated weights stay bit-equal, which `join` demands."""
    answers = ranks.run(size, clipped, size)
    gradients = join([piece for _, pieces, _ in answers for piece in pieces])
    weights = join([piece for *_, pieces in answers for piece in pieces])
    total = sum(gradient.square().sum() for gradient in gradients.values()).sqrt()
    assert total.item() == pytest.approx(LIMIT, rel=1e-12)
    truth = MegatronBertForMaskedLM(MegatronBertConfig(**SIZES), dtype=torch.float64).train()
    optimizer = torch.optim.SGD(truth.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        truth(IDS, labels=IDS).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(truth.parameters(), LIMIT)  # right in one process
        optimizer.step()
    assert {answer[0] for answer in answers} == {answers[0][0]}
    assert answers[0][0] == pytest.approx(norm.item(), rel=1e-5)  # torch adds 1e-6 to the norm
    for part in truth.parts():
        expected = part.view(part.parameter.detach())
        torch.testing.assert_close(weights[part.source], expected, rtol=1e-5, atol=1e-6)


def test_a_small_gradient_is_left_as_it_is():
    model = MegatronBertForMaskedLM(MegatronBertConfig(**SIZES))
    model(IDS, labels=IDS).loss.backward()
    before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    assert model.clip_grad_norm_(1e6) > 0
    after = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("probabilities", [True, False])
def test_autocast_trains_as_torch_documents_it(dropout, probabilities):
    """Forward inside of it, backward outside; gradients are float32 and near those without."""
    settings = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = MegatronBertForPreTraining(MegatronBertConfig(**SIZES, **settings)).train()
    given = {"labels": IDS, "next_sentence_label": torch.tensor([0, 1]), "sample_numbers": (4, 5)}
    given |= {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    given |= {"output_attentions": probabilities}
    exact = gradients_of(model, model(IDS, **given).loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(IDS, **given).loss
    assert loss.dtype == torch.float32
    found = gradients_of(model, loss)
    assert found.keys() == exact.keys()
    largest = max(gradient.abs().max().item() for gradient in exact.values())
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        # bfloat16 keeps 8 bits: some 1/256 at each of a dozen products.
        assert (gradient - exact[name]).abs().max() < 0.05 * largest, name


def gradients_of(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def copied_on_a_rank(tensor: int) -> bool:
    model = MegatronBertForMaskedLM(MegatronBertConfig(**SIZES), mesh=build_mesh(Layout(tensor=tensor))).eval()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_input_embeddings().weight.add_(1)
    own = twin.get_output_embeddings().weight is twin.get_input_embeddings().weight
    return own and not torch.equal(twin(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("size", [1, 2])
def test_a_copy_of_a_model_talks_to_the_same_ranks_and_has_its_own_weights(ranks, size):
    assert ranks.run(size, copied_on_a_rank, size) == [True] * size


def test_dropout_goes_on_where_it_was_left():
    model = MegatronBertForMaskedLM(MegatronBertConfig(**SIZES)).train()
    losses = [model(IDS, labels=IDS).loss.item() for _ in range(3)]
    assert len(set(losses)) == 3
    again = MegatronBertForMaskedLM(MegatronBertConfig(**SIZES)).train()
    assert again.samples_seen == 0
    again.samples_seen = 4
    assert again(IDS, labels=IDS).loss.item() == losses[2]
    assert again.samples_seen == 6


def test_any_of_several_stop_words_ends_a_sample():
    config = MegatronBertConfig(**SIZES, is_decoder=True)
    model = MegatronBertForCausalLM(config, seed=3).eval()
    free = model.generate(IDS[:1], max_new_tokens=6)
    stop = int(free[0, 6])
    first = free[0, 5:].tolist().index(stop)
    for stops in (stop, [36, stop], (stop,)):
        stopped = model.generate(IDS[:1], max_new_tokens=6, eos_token_id=stops)
        assert torch.equal(stopped, free[:, : 6 + first])
    model.config.eos_token_id = [36, stop]
    assert model.generate(IDS[:1], max_new_tokens=6).shape[1] == 6 + first


def test_layers_are_counted_and_frozen_as_in_transformers():
    model = MegatronBertForSequenceClassification(MegatronBertConfig(**SIZES))
    layers = model.bert.encoder.layer
    assert list(layers) == [layers[0], layers[1]] == layers[:2]
    assert layers[-1] is layers[1]
    assert model.base_model is model.bert
    layers[0].requires_grad_(False)
    whole, rest = model.num_parameters(), model.num_parameters(only_trainable=True)
    assert whole - rest == 2 * 2 * 16 + 4 * (16 * 16 + 16) + (24 * 16 + 24) + (16 * 24 + 16)


def test_the_parts_of_the_pretraining_loss_have_no_place_in_the_tuple():
    model = MegatronBertForPreTraining(MegatronBertConfig(**SIZES)).eval()
    given = {"labels": IDS, "next_sentence_label": torch.tensor([0, 1])}
    loss, words, pairs = model(IDS, **given, return_dict=False)
    output = model(IDS, **given)
    assert len(output) == 3
    assert output.get("masked_lm_loss") + output["next_sentence_loss"] == loss == output.loss
    assert dict(output.items()).keys() == set(output.keys())
    assert torch.equal(output.values()[1], words)
    assert torch.equal(output[2], pairs)
    assert output.get("attentions") is None
