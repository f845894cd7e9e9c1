"""AdamW: which parameters decay, the numbers that reach torch, and its step against the paper's formula."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_bert_tp.model.shape import tensor_shapes
from megatron_bert_tp.optim.roles import is_decayed
from megatron_bert_tp.optim.rules import OptimizerNumbers, build_optimizer, moment_of, step_
from megatron_bert_tp.parallel.ownership import Owned
from tests.optim.rectangles import WHOLES, Whole, built, owned_of, part_of
from tests.support import ODD_SHAPE

NUMBERS = OptimizerNumbers(name="adamw", beta1=0.8, beta2=0.95, epsilon=1e-3, weight_decay=0.3)
LAYER = "bert.encoder.layer.0"
# By hand, from the names of `transformers`' MegatronBertForPreTraining with one layer.
DECAYED = {
    "bert.embeddings.word_embeddings.weight",
    "bert.embeddings.position_embeddings.weight",
    "bert.embeddings.token_type_embeddings.weight",
    f"{LAYER}.attention.self.query.weight",
    f"{LAYER}.attention.self.key.weight",
    f"{LAYER}.attention.self.value.weight",
    f"{LAYER}.attention.output.dense.weight",
    f"{LAYER}.intermediate.dense.weight",
    f"{LAYER}.output.dense.weight",
    "bert.pooler.dense.weight",
    "cls.predictions.transform.dense.weight",
    "cls.predictions.decoder.weight",
    "cls.seq_relationship.weight",
}
NOT_DECAYED = {
    f"{LAYER}.attention.ln.weight",
    f"{LAYER}.attention.ln.bias",
    f"{LAYER}.attention.self.query.bias",
    f"{LAYER}.attention.self.key.bias",
    f"{LAYER}.attention.self.value.bias",
    f"{LAYER}.attention.output.dense.bias",
    f"{LAYER}.ln.weight",
    f"{LAYER}.ln.bias",
    f"{LAYER}.intermediate.dense.bias",
    f"{LAYER}.output.dense.bias",
    "bert.encoder.ln.weight",
    "bert.encoder.ln.bias",
    "bert.pooler.dense.bias",
    "cls.predictions.bias",
    "cls.predictions.transform.dense.bias",
    "cls.predictions.transform.LayerNorm.weight",
    "cls.predictions.transform.LayerNorm.bias",
    "cls.seq_relationship.bias",
}
UNTIED = replace(ODD_SHAPE, num_hidden_layers=1, tie_word_embeddings=False)


def test_biases_and_layer_norms_do_not_decay_and_all_else_does():
    assert tensor_shapes(UNTIED).keys() == DECAYED | NOT_DECAYED
    assert {name for name in tensor_shapes(UNTIED) if is_decayed(name)} == DECAYED


def test_every_rectangle_is_in_the_group_of_its_name_and_has_its_gradient():
    owned = owned_of(WHOLES)
    optimizer = built(owned, NUMBERS)
    names = {id(each.weight): each.part.name for each in owned}
    moved = [id(weight) for group in optimizer.param_groups for weight in group["params"]]
    assert sorted(moved) == sorted(names)
    for group in optimizer.param_groups:
        assert {is_decayed(names[id(weight)]) for weight in group["params"]} == {group["weight_decay"] > 0}
    assert all(each.weight.grad.data_ptr() == each.gradient.data_ptr() for each in owned)


def test_the_numbers_reach_both_groups():
    optimizer = built(owned_of(WHOLES), NUMBERS)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["fused"]) == ((0.8, 0.95), 1e-3, True)


def test_a_rank_without_one_of_the_groups_has_the_other():
    (group,) = built(owned_of([Whole("a.ln.weight", (5,))]), NUMBERS).param_groups
    assert group["weight_decay"] == 0


def updated(weight: float, gradients: list[float], decays: list[float]) -> tuple[float, float, float]:
    """Loshchilov and Hutter 2019, algorithm 2, for one number: weight and both moments."""
    first = second = 0.0
    for step, (gradient, rate, decay) in enumerate(zip(gradients, RATES, decays, strict=True), start=1):
        first = NUMBERS.beta1 * first + (1 - NUMBERS.beta1) * gradient
        second = NUMBERS.beta2 * second + (1 - NUMBERS.beta2) * gradient**2
        size = math.sqrt(second / (1 - NUMBERS.beta2**step)) + NUMBERS.epsilon
        weight -= rate * (first / (1 - NUMBERS.beta1**step) / size + decay * weight)
    return weight, first, second


WEIGHTS = [1.0, -2.0, 0.5]
GRADIENTS = [[0.1, -3.0, 0.0], [0.2, 1.0, 1e-5], [-0.7, 2.0, 1e-3]]
RATES = [0.1, 0.02, 0.3]
DECAYS = [0.3, 0.1, 0.0]


@pytest.mark.parametrize(("name", "decays"), [("a.weight", DECAYS), ("a.bias", [0.0] * 3)])
def test_three_steps_are_those_of_the_paper(name, decays):
    weight = torch.tensor(WEIGHTS, dtype=torch.float64)
    owned = Owned(part_of(Whole(name, (3,))), weight, torch.zeros_like(weight))
    optimizer = built([owned], NUMBERS)
    for gradient, rate, decay in zip(GRADIENTS, RATES, DECAYS, strict=True):
        owned.gradient.copy_(torch.tensor(gradient, dtype=torch.float64))
        step_(optimizer, rate=rate, weight_decay=decay)
    columns = zip(WEIGHTS, zip(*GRADIENTS, strict=True), strict=True)
    truth = zip(*(updated(weight, list(gradients), decays) for weight, gradients in columns), strict=True)
    found = (weight, moment_of(optimizer, "exp_avg")(owned), moment_of(optimizer, "exp_avg_sq")(owned))
    for values, numbers in zip(found, truth, strict=True):
        # About ten operations a step on numbers below 10, each rounded by 1e-16 relative; three steps.
        assert values.tolist() == pytest.approx(numbers, rel=1e-14, abs=1e-14)


def test_adamw_sends_nothing():
    def refuse(_vector):
        raise AssertionError("a message")

    optimizer = build_optimizer(owned_of(WHOLES), NUMBERS, sum_over_owners=refuse)
    step_(optimizer, rate=0.1, weight_decay=0.1)
