"""AdamW: which parameters decay, the numbers that reach torch, and its step against the paper's formula."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megatron_bert_tp.model.shape import tensor_shapes
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.optim.adamw import MOMENTS, AdamWNumbers, build_adamw, is_decayed, moment_of, restart_, step_
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.pipeline.partition import partition
from tests.support import ODD_SHAPE

NUMBERS = AdamWNumbers(beta1=0.8, beta2=0.95, epsilon=1e-3, weight_decay=0.3)
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


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_every_parameter_of_a_stage_is_in_the_group_of_its_name(is_tied):
    shape = replace(UNTIED, tie_word_embeddings=is_tied)
    stage = MegatronBertStage(shape, partition(1, 1)[0], axis=Axis.alone("tensor"))
    optimizer = build_adamw(stage.trained_parameters(), NUMBERS)
    names = {id(part.parameter): part.name for part in stage.parts()}
    for group in optimizer.param_groups:
        assert {names[id(parameter)] in DECAYED for parameter in group["params"]} == {group["weight_decay"] > 0}
    moved = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    projection = {id(stage.cls.predictions.decoder.weight)} if is_tied else set()
    assert len(moved) == len(set(moved))
    assert set(moved) == {id(parameter) for parameter in stage.parameters()} - projection


def test_the_numbers_reach_both_groups():
    parameters = {name: nn.Parameter(torch.ones(2)) for name in ("a.weight", "a.bias")}
    optimizer = build_adamw(parameters, NUMBERS)
    assert [group["params"] for group in optimizer.param_groups] == [[p] for p in parameters.values()]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["fused"]) == ((0.8, 0.95), 1e-3, True)


def test_a_stage_without_one_of_the_groups_has_the_other():
    (group,) = build_adamw({"a.bias": nn.Parameter(torch.ones(2))}, NUMBERS).param_groups
    assert group["weight_decay"] == 0


def updated(weight: float, gradients: list[float], rates: list[float], decay: float) -> tuple[float, float, float]:
    """Loshchilov and Hutter 2019, algorithm 2, for one number: weight and both moments."""
    first = second = 0.0
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        first = NUMBERS.beta1 * first + (1 - NUMBERS.beta1) * gradient
        second = NUMBERS.beta2 * second + (1 - NUMBERS.beta2) * gradient**2
        size = math.sqrt(second / (1 - NUMBERS.beta2**step)) + NUMBERS.epsilon
        weight -= rate * (first / (1 - NUMBERS.beta1**step) / size + decay * weight)
    return weight, first, second


WEIGHTS = [1.0, -2.0, 0.5]
GRADIENTS = [[0.1, -3.0, 0.0], [0.2, 1.0, 1e-5], [-0.7, 2.0, 1e-3]]
RATES = [0.1, 0.02, 0.3]


@pytest.fixture
def parameters() -> dict[str, nn.Parameter]:
    values = torch.tensor(WEIGHTS, dtype=torch.float64)
    return {name: nn.Parameter(values.clone()) for name in ("a.weight", "a.bias")}


def walk_(optimizer: torch.optim.AdamW, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        for parameter in parameters.values():
            parameter.grad = torch.tensor(GRADIENTS[step], dtype=torch.float64)
        step_(optimizer, RATES[step])


def assert_near(found: Tensor, truth: list[float]) -> None:
    # About ten operations a step on numbers below 10, each rounded by 1e-16 relative; three steps.
    assert found.tolist() == pytest.approx(truth, rel=1e-14, abs=1e-14)


@pytest.mark.parametrize(("name", "decay"), [("a.weight", 0.3), ("a.bias", 0.0)])
def test_three_steps_are_those_of_the_paper(parameters, name, decay):
    optimizer = build_adamw(parameters, NUMBERS)
    walk_(optimizer, parameters, range(3))
    columns = zip(WEIGHTS, zip(*GRADIENTS, strict=True), strict=True)
    truth = [updated(weight, list(gradients), RATES, decay) for weight, gradients in columns]
    assert_near(parameters[name].detach(), [weight for weight, _, _ in truth])
    assert_near(optimizer.state[parameters[name]]["exp_avg"], [first for _, first, _ in truth])
    assert_near(optimizer.state[parameters[name]]["exp_avg_sq"], [second for _, _, second in truth])


def test_an_optimizer_that_starts_again_goes_on_bit_for_bit(parameters):
    first = build_adamw(parameters, NUMBERS)
    walk_(first, parameters, range(2))
    copies = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
    again = build_adamw(copies, NUMBERS)
    restart_(again, 2)
    for name, copy in copies.items():
        for kind in MOMENTS:
            assert not again.state[copy][kind].any()
            again.state[copy][kind].copy_(first.state[parameters[name]][kind])
    walk_(first, parameters, range(2, 3))
    walk_(again, copies, range(2, 3))
    assert all(torch.equal(copies[name], parameter) for name, parameter in parameters.items())


@pytest.mark.parametrize("kind", MOMENTS)
def test_the_moment_of_a_part_is_that_of_its_parameter(kind):
    stage = MegatronBertStage(UNTIED, partition(1, 1)[0], axis=Axis.alone("tensor"))
    optimizer = build_adamw(stage.trained_parameters(), NUMBERS)
    restart_(optimizer, 1)
    for part in stage.parts():
        moment = moment_of(optimizer, kind)(part)
        assert moment is optimizer.state[part.parameter][kind]
        assert part.view(moment).shape == part.local_shape
