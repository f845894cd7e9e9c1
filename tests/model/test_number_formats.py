"""Models of 16 bits on CPU: no number is off by more than what storing it in 16 bits explains."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_bert_tp.model.dot_product import attend
from megatron_bert_tp.model.shape import HEADS
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.narrow import layer_norm, look_up
from megatron_bert_tp.parallel.random_bits import Place, RandomBits, dropout_add, keep_mask
from tests.model.stages import SMALL, Model, Way, batches_of, built, loss_of
from tests.support import with_dropout

ALONE = Axis.alone("tensor")
NARROW = [torch.bfloat16, torch.float16]


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distance(found: Tensor, truth: Tensor) -> float:
    """Of two tensors, relative to the norm of the second."""
    return ((found.double() - truth).norm() / truth.norm()).item()


def assert_close_to_float64(function: Callable[..., Tensor], *given: Tensor, roundings: float) -> None:
    """Output and gradients; storing alone is off by at most half an eps, on average by a quarter."""
    eps = torch.finfo(given[0].dtype).eps
    narrow = [tensor.clone().requires_grad_() for tensor in given]
    wide = [tensor.double().requires_grad_() for tensor in given]
    found, truth = function(*narrow), function(*wide)
    assert found.dtype == given[0].dtype
    assert distance(found.detach(), truth.detach()) < roundings * eps / 4
    grad = draw(*found.shape, dtype=found.dtype, seed=99)
    found.backward(grad)
    truth.backward(grad.double())
    for ours, theirs in zip(narrow, wide, strict=True):
        assert distance(ours.grad, theirs.grad) < roundings * eps / 4


@pytest.mark.parametrize("dtype", NARROW)
def test_layer_norm_rounds_once(dtype):
    x = draw(4096, 64, dtype=dtype, seed=1) * 3 + 1
    weight, bias = draw(64, dtype=dtype, seed=2) + 1, draw(64, dtype=dtype, seed=3)
    assert_close_to_float64(lambda *given: layer_norm(*given, 1e-12), x, weight, bias, roundings=1.2)


@pytest.mark.parametrize("dtype", NARROW)
def test_gradient_of_two_token_types_is_summed_exactly(dtype):
    ids = torch.randint(0, 2, (4, 2048), generator=torch.Generator().manual_seed(1))
    ids[:, 0], weight = 2, draw(3, 16, dtype=dtype, seed=2)
    assert_close_to_float64(lambda weight: look_up(ids, weight, padding_idx=2), weight, roundings=1.2)
    weight.requires_grad_()
    look_up(ids, weight, padding_idx=2).sum().backward()
    assert weight.grad[2].eq(0).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_dropout_scales_without_a_bias(dtype):
    """1 / 0.9 by itself is off by 0.2% in bfloat16, for all elements alike."""
    x, ones = draw(8, 128, 32, dtype=dtype, seed=1), torch.ones(8, 128, 32, dtype=dtype)
    bits = RandomBits(3, tuple(range(8)))

    def function(x: Tensor) -> Tensor:
        return dropout_add(x, None, bits, probability=0.1, layer=1, place=Place.MLP_OUTPUT)

    assert_close_to_float64(function, x, roundings=1.3)
    signed = ((function(x).double() - function(x.double())) * x.sign()).mean() / x.double().abs().mean()
    assert abs(signed.item()) < torch.finfo(dtype).eps / 50
    assert function(ones).unique().numel() == 2


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("probability", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1, 2])
def test_attention_is_as_exact_as_its_storage(dtype, probability, scale):
    """Probabilities and their gradients are stored once each, and the scores not at all."""
    packed = draw(3, 2, 4, 64, 32, dtype=dtype, seed=1) * scale
    lanes = RandomBits(3, (5, 6)).attention(1, heads=range(4), positions=64, max_positions=64)
    keep = keep_mask(lanes, probability) if probability else None
    assert_close_to_float64(
        lambda packed: attend(packed, None, keep, probability), packed, roundings=2.5 * scale
    )


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_a_stage_trains_and_is_near_float64(dtype, probability):
    """Three layers deep: about the root of the some thirty numbers that are stored on the way, in eps / 4."""
    model = Model(with_dropout(SMALL, probability), dtype=dtype)
    stage, truth = built(model, Way(), ALONE), built(replace(model, dtype=torch.float64), Way(), ALONE)
    for ours, theirs in zip(stage.parameters(), truth.parameters(), strict=True):
        theirs.data.copy_(ours.data)
    (batch,) = batches_of(model, [(16, 16, 9, 13)])
    losses = [loss_of(each, each(None, batch), batch) for each in (stage, truth)]
    assert losses[0].dtype == torch.float32
    for loss in losses:
        loss.backward()
    eps = torch.finfo(dtype).eps
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=2 * eps)
    named = dict(truth.named_parameters())
    whole = {name: named[name].grad for name, _ in stage.named_parameters()}
    for name, parameter in stage.named_parameters():
        assert parameter.grad.dtype == dtype
        assert parameter.grad.isfinite().all(), name
    found = torch.cat([parameter.grad.double().flatten() for parameter in stage.parameters()])
    expected = torch.cat([grad.flatten() for grad in whole.values()])
    assert distance(found, expected) < 4 * eps


@pytest.mark.parametrize("architecture", sorted(HEADS))
def test_logits_of_few_classes_are_float32_for_the_loss(architecture):
    model = Model(head=HEADS[architecture], dtype=torch.bfloat16)
    stage = built(model, Way(), ALONE)
    (batch,) = batches_of(model, [(13, 9, 11)])
    output = stage(None, batch)
    head = model.head
    if head.has_next_sentence:
        assert (output.next_sentence if head.has_predictions else output).dtype == torch.float32
    elif head.linear:
        assert output.dtype == torch.float32
    else:
        assert output.dtype == torch.bfloat16  # the loss over the vocabulary widens its logits itself
    loss_of(stage, output, batch).backward()
