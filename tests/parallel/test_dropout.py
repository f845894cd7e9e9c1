"""Dropout with residual against multiplication by the mask, float64."""

import pytest
import torch
from torch import Tensor

from megatron_bert_tp.parallel.random_bits import Place, RandomBits, dropout_add, dropped_share

SHAPE = (2, 3, 10)
BITS = RandomBits(7, (4, 9))
PLACE = Place.ATTENTION_OUTPUT


def draw(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, dtype=torch.float64, generator=generator).requires_grad_()


def factor(probability: float) -> Tensor:
    """0 or 1 / (1 - p) by the definition: kept where the lane reaches the threshold."""
    lanes = BITS.hidden(2, PLACE, positions=SHAPE[1], features=SHAPE[2])
    is_kept = lanes.int() >= round(probability * 65536) - 32768
    return is_kept.double() / (1 - dropped_share(probability))


def drop(x: Tensor, residual: Tensor | None, probability: float = 0.3) -> Tensor:
    return dropout_add(x, residual, BITS, probability=probability, layer=2, place=PLACE)


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_forward_and_gradients_are_those_of_the_mask(probability):
    """Up to one rounding of the factor, which is divided here and multiplied there."""
    x, residual, grad = draw(1), draw(2), draw(3).detach()
    output = drop(x, residual, probability)
    output.backward(grad)
    exact = {"rtol": 1e-15, "atol": 1e-15}
    torch.testing.assert_close(output, residual + x * factor(probability), **exact)
    torch.testing.assert_close(x.grad, grad * factor(probability), **exact)
    assert torch.equal(residual.grad, grad)
    assert {0, SHAPE[1] * SHAPE[2]}.isdisjoint((x.grad == 0).sum((1, 2)).tolist())


def test_gradcheck_with_and_without_residual():
    assert torch.autograd.gradcheck(drop, (draw(1), draw(2)))
    assert torch.autograd.gradcheck(lambda x: drop(x, None), draw(1))


def test_residual_that_needs_no_gradient_gets_none():
    x, residual = draw(1), draw(2).detach()
    drop(x, residual).sum().backward()
    assert x.grad is not None
    assert residual.grad is None


def test_one_tensor_as_input_and_residual_gets_both_gradients():
    x, grad = draw(1), draw(3).detach()
    drop(x, x).backward(grad)
    torch.testing.assert_close(x.grad, grad * (1 + factor(0.3)), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize(("bits", "probability"), [(None, 0.3), (BITS, 0.0)])
def test_without_bits_or_probability_nothing_is_dropped(bits, probability):
    x, residual = draw(1), draw(2)
    arguments = {"probability": probability, "layer": 2, "place": PLACE}
    assert torch.equal(dropout_add(x, residual, bits, **arguments), residual + x)
    assert dropout_add(x, None, bits, **arguments) is x
