"""Weight gradients put off: when, to whom, and what is alive in the meantime; the bits are `test_recompute`'s."""

import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from megatron_bert_tp.model.recompute import Recompute
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.parallel.linear import ColumnParallelLinear, ParallelLinear
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.weight_gradients import WeightGradients
from tests.model.stages import SMALL, Model, Way, batches_of, built, loss_of

ALONE = Axis.alone("tensor")
# Each layer's four products, and the projection on the vocabulary.
NUM_PRODUCTS = 4 * SMALL.num_hidden_layers + 1


@pytest.fixture
def stage() -> MegatronBertStage:
    return built(Model(), Way(), ALONE)


def one_loss(stage: MegatronBertStage) -> Tensor:
    (batch,) = batches_of(Model(), [(13, 9, 11)])
    return loss_of(stage, stage(None, batch), batch)


def put_off_ones(stage: MegatronBertStage) -> dict[str, nn.Parameter]:
    """Parameters whose gradients wait: weights and biases of the layers that are split over the axis."""
    owners = [layer for layer in stage.modules() if isinstance(layer, ParallelLinear)]
    own = {id(parameter) for layer in owners for parameter in layer.parameters()}
    own.add(id(stage.cls.predictions.bias))
    return {name: parameter for name, parameter in stage.named_parameters() if id(parameter) in own}


def tensors_of(work: object) -> list[Tensor]:
    """All tensors that a piece of work holds, parameters left out."""
    if isinstance(work, nn.Parameter):
        return []
    if isinstance(work, Tensor):
        return [work]
    if isinstance(work, partial):
        return [t for part in (*work.args, *work.keywords.values()) for t in tensors_of(part)]
    return [t for part in work for t in tensors_of(part)] if isinstance(work, list | tuple) else []


def test_the_input_pass_leaves_out_the_products_and_nothing_else(stage):
    waiting = put_off_ones(stage)
    with stage.weight_gradients.put_off() as works:
        one_loss(stage).backward()
    assert len(works) == NUM_PRODUCTS
    without = {name for name, parameter in stage.named_parameters() if parameter.grad is None}
    assert without == waiting.keys()
    for work in works:
        work()
    assert all(parameter.grad is not None for parameter in stage.parameters())


@pytest.mark.parametrize("kind", ["none", "full"])
def test_after_the_input_pass_only_inputs_and_gradients_of_products_are_alive(stage, kind):
    stage.bert.encoder.recompute = Recompute(kind)
    references = []

    def refer(_module, _given, output):
        references.append(weakref.ref(output))

    for layer in stage.bert.encoder.layer.values():
        layer.intermediate.register_forward_hook(refer)
        layer.ln.register_forward_hook(refer)
    with stage.weight_gradients.put_off() as works:
        one_loss(stage).backward()
    assert len(references) >= 2 * SMALL.num_hidden_layers
    assert [reference() for reference in references] == [None] * len(references)
    held = [tensor for work in works for tensor in tensors_of(work)]
    assert len(held) == 2 * NUM_PRODUCTS
    assert all(tensor.grad_fn is None and not tensor.requires_grad for tensor in held)


def test_finished_gradients_go_where_they_are_to_be_delivered(stage):
    delivered: dict[int, Tensor] = {}
    stage.weight_gradients.deliver = lambda parameter, grad: delivered.update({id(parameter): grad})
    with stage.weight_gradients.put_off() as works:
        one_loss(stage).backward()
    assert not delivered
    for work in works:
        work()
    waiting = put_off_ones(stage)
    assert delivered.keys() == {id(parameter) for parameter in waiting.values()}
    assert all(parameter.grad is None for parameter in waiting.values())
    truth = built(Model(), Way(), ALONE)
    one_loss(truth).backward()
    for name, parameter in put_off_ones(truth).items():
        assert torch.equal(delivered[id(waiting[name])], parameter.grad), name


def test_outside_of_it_gradients_are_computed_at_once(stage):
    with stage.weight_gradients.put_off() as works:
        pass
    one_loss(stage).backward()
    assert works == []
    assert all(parameter.grad is not None for parameter in stage.parameters())


def test_an_error_in_the_input_pass_ends_the_putting_off(stage):
    with pytest.raises(ZeroDivisionError), stage.weight_gradients.put_off():
        raise ZeroDivisionError
    assert not stage.weight_gradients.is_put_off


def test_frozen_weights_put_nothing_off(stage):
    stage.requires_grad_(False)
    stage.bert.embeddings.token_type_embeddings.weight.requires_grad_(True)
    with stage.weight_gradients.put_off() as works:
        one_loss(stage).backward()
    assert works == []
    assert stage.bert.embeddings.token_type_embeddings.weight.grad is not None


def test_two_stages_put_off_apart():
    first, second = (built(replace(Model(), is_packed=packed), Way(), ALONE) for packed in (False, True))
    with first.weight_gradients.put_off() as works:
        one_loss(second).backward()
    assert works == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_bits_are_those_of_the_joint_backward(dtype):
    gradients = []
    for puts_off in (False, True):
        torch.manual_seed(1)
        layer = ColumnParallelLinear(8, 6, axis=ALONE, dtype=torch.float32)
        nn.init.normal_(layer.weight)
        layer.weight_gradients = WeightGradients()
        x = torch.randn(5, 8, requires_grad=True)
        with torch.autocast("cpu", dtype=dtype):
            loss = layer(x).float().square().sum()
        if puts_off:
            with layer.weight_gradients.put_off() as works:
                loss.backward()
            assert layer.weight.grad is layer.bias.grad is None
            for work in works:
                work()
        else:
            loss.backward()
        gradients.append((x.grad, layer.weight.grad, layer.bias.grad))
    for joint, later in zip(*gradients, strict=True):
        assert later.dtype == torch.float32
        assert torch.equal(joint, later)
