"""Attention with dropout against a plain composition under autograd, float64."""

import math

import pytest
import torch
from torch import Tensor

from megatron_bert_tp.model.dot_product import attend
from megatron_bert_tp.model.masks import self_attention_mask
from megatron_bert_tp.parallel.random_bits import RandomBits, dropped_share, keep_mask

BATCH, HEADS, SEQUENCE, HEAD = 2, 3, 7, 4
MASK = torch.arange(SEQUENCE) < torch.tensor([7, 4])[:, None]
# Chains of a few products of numbers near 1, in another order.
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def keep_of(probability: float) -> Tensor:
    lanes = RandomBits(3, (5, 6)).attention(1, heads=range(HEADS), positions=SEQUENCE, max_positions=9)
    return keep_mask(lanes, probability)


def padding_of(mask: Tensor | None) -> Tensor | None:
    like = torch.zeros((), dtype=torch.float64)
    return self_attention_mask(mask, queries=SEQUENCE, keys=SEQUENCE, is_causal=False, like=like)


def composed(packed: Tensor, mask: Tensor | None, keep: Tensor | None, probability: float) -> Tensor:
    """Softmax over the real keys, times the mask of dropout, times the values."""
    query, key, value = packed
    scores = query @ key.mT / math.sqrt(HEAD)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    probabilities = scores.softmax(-1)
    if keep is not None:
        probabilities = probabilities * keep / (1 - dropped_share(probability))
    return probabilities @ value


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5])
def test_attention_equals_the_plain_composition(probability, mask):
    keep = keep_of(probability) if probability else None
    ours, truth = (draw(3, BATCH, HEADS, SEQUENCE, HEAD, seed=1).requires_grad_() for _ in range(2))
    grad = draw(BATCH, HEADS, SEQUENCE, HEAD, seed=2)
    found = attend(ours, padding_of(mask), keep, probability)
    expected = composed(truth, mask, keep, probability)
    found.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(ours.grad, truth.grad, **EXACT)
    assert not torch.equal(keep_of(0.5), torch.ones_like(keep_of(0.5)))


def test_gradcheck_with_dropout_and_padding():
    packed = draw(3, BATCH, HEADS, SEQUENCE, HEAD, seed=1).requires_grad_()
    padding = padding_of(MASK)
    assert torch.autograd.gradcheck(lambda x: attend(x, padding, keep_of(0.3), 0.3), packed)


def test_gradient_that_is_not_contiguous_is_read_right():
    """As it arrives from the transpose after the attention."""
    keep, grad = keep_of(0.3), draw(BATCH, SEQUENCE, HEADS, HEAD, seed=2).transpose(1, 2)
    strided, packed = (draw(3, BATCH, HEADS, SEQUENCE, HEAD, seed=1).requires_grad_() for _ in range(2))
    attend(strided, None, keep, 0.3).backward(grad)
    attend(packed, None, keep, 0.3).backward(grad.contiguous())
    assert torch.equal(strided.grad, packed.grad)


@pytest.mark.parametrize("keep", [None, keep_of(0.3)], ids=["plain", "dropout"])
def test_what_stands_at_padding_has_no_influence(keep):
    packed = draw(3, BATCH, HEADS, SEQUENCE, HEAD, seed=1)
    changed = packed.clone()
    changed[1:, 1, :, 4:] = 1e3
    padding = padding_of(MASK)
    assert torch.equal(attend(packed, padding, keep, 0.3), attend(changed, padding, keep, 0.3))


def test_no_mask_means_no_padding():
    assert padding_of(None) is None
