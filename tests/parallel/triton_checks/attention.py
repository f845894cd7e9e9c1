"""Attention with the bits inside against the CPU twin in float64, within bounds on rounding."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_bert_tp.errors import ArgumentError
from megatron_bert_tp.model import dot_product
from megatron_bert_tp.parallel.random_bits import RandomBits, dropped_share, keep_mask
from megatron_bert_tp.parallel.triton_attention import PairBits, attend

BATCH, HEADS, LAYER = 2, 2, 3
BITS = RandomBits(2**40 + 7, (5, 2**33))
# Relative error of a number that is rounded once: products, sums and stored results.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Case:
    sequence: int
    head_size: int = 16
    max_positions: int = 80
    mask: str = "none"
    probability: float = 0.1
    first_head: int = 0
    dtype: torch.dtype = torch.float32


CASES = [
    Case(1),
    Case(37, head_size=24, max_positions=48, mask="keys"),
    Case(64, head_size=64, max_positions=512, first_head=6),
    Case(70, head_size=128, mask="heads", first_head=2),
    Case(41, mask="queries", probability=0.5),
    Case(41, mask="keys", probability=0.0),
    Case(41, mask="lowest"),
    Case(41, mask="lengths"),
    Case(40, max_positions=45, mask="keys", first_head=1),
    Case(100, head_size=64, max_positions=112, mask="keys", dtype=torch.bfloat16),
    Case(100, head_size=32, max_positions=112, mask="lengths", dtype=torch.float16, probability=0.0),
]


def draw(seed: int, *shape: int, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask_of(case: Case) -> Tensor | None:
    """Additive mask; the twin has no lengths and sees them as a mask of keys."""
    size = case.sequence
    lengths = torch.tensor([max(1, size - 9), size])
    padding = (torch.arange(size) >= lengths[:, None])[:, None, None] * LOWEST
    masks = {
        "none": None,
        "keys": padding,
        "lengths": padding,
        "lowest": torch.stack([padding[1], torch.full_like(padding[0], LOWEST)]),
        "queries": draw(9, BATCH, 1, size, size).tril() + torch.ones(size, size).triu(1) * LOWEST,
        "heads": draw(9, 1, HEADS, size, size),
    }
    return masks[case.mask]


def keep_of(case: Case) -> Tensor | None:
    if not case.probability:
        return None
    heads = range(case.first_head, case.first_head + HEADS)
    lanes = BITS.attention(LAYER, heads=heads, positions=case.sequence, max_positions=case.max_positions)
    return keep_mask(lanes, case.probability)


def ours(case: Case, packed: Tensor, mask: Tensor | None) -> Tensor:
    device = packed.device
    heads = range(case.first_head, case.first_head + HEADS)
    bits = PairBits.of(BITS, LAYER, heads=heads, max_positions=case.max_positions, device=device)
    lengths = torch.tensor([max(1, case.sequence - 9), case.sequence], device=device)
    if case.mask == "lengths":
        return attend(packed, None, bits, probability=case.probability, lengths=lengths)
    return attend(packed, None if mask is None else mask.to(device), bits, probability=case.probability)


def bounds(packed: Tensor, mask: Tensor | None, keep: Tensor | None, grad: Tensor, case: Case):
    """Largest errors of context and gradients, from the sizes of all that is added up, in float64.

    A score of head size d is off by at most (d + 2) u sum|q k| / sqrt(d), and so relatively is its exponential;
    that has |score| + 4 roundings of its own, and sums over n keys n more.  What is stored in 16 bits in between
    (probabilities, gradients of scores, context) adds two of its roundings u16.  A product of two such numbers
    has twice the error, and the constant is that for the longest chain, gradients of scores times inputs.
    """
    query, key, value = packed
    size, d = case.sequence, packed.shape[-1]
    scores = query @ key.mT / math.sqrt(d)
    off = (d + 2) * (query.abs() @ key.abs().mT).max() / math.sqrt(d) + scores.abs().max() + 4 + size + d
    relative = 4 * off * ROUNDING[torch.float32] + 4 * ROUNDING[case.dtype]
    softmax = (scores if mask is None else scores + mask).softmax(-1)
    dropped = softmax if keep is None else softmax * keep / (1 - dropped_share(case.probability))
    context = dropped @ value.abs()
    row_sums = (grad.abs() * context).sum(-1, keepdim=True)
    grad_scores = dropped * (grad.abs() @ value.abs().mT) + softmax * row_sums
    grad_query, grad_key = grad_scores @ key.abs() / math.sqrt(d), grad_scores.mT @ query.abs() / math.sqrt(d)
    smallest = torch.finfo(case.dtype).tiny  # numbers below it have fewer digits
    grads = torch.stack([grad_query, grad_key, dropped.mT @ grad.abs()])
    return relative * context + smallest, relative * grads + smallest


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients_equal_the_cpu_twin(device, case):
    if device.type == "cpu" and case.dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16; float16 goes the same way")
    shape = (BATCH, HEADS, case.sequence, case.head_size)
    packed, grad = draw(1, 3, *shape, dtype=case.dtype), draw(2, *shape, dtype=case.dtype)
    mask, keep = mask_of(case), keep_of(case)
    exact = packed.double().requires_grad_()
    expected = dot_product.attend(exact, mask, keep, case.probability)
    expected.backward(grad.double())
    own = packed.to(device).requires_grad_()
    found = ours(case, own, mask)
    found.backward(grad.to(device))
    context_bound, grads_bound = bounds(packed.double(), mask, keep, grad.double(), case)
    assert found.dtype == case.dtype
    assert ((found.cpu().double() - expected).abs() <= context_bound).all()
    assert ((own.grad.cpu().double() - exact.grad).abs() <= grads_bound).all()
    # Bounds that a wrong mask would pass are none.
    assert context_bound.max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("key", range(4))
def test_a_pair_is_kept_where_its_lane_reaches_the_threshold(device, key):
    """With values that are the unit vectors, the context is the row of dropped probabilities."""
    lane = BITS.attention(LAYER, heads=range(1), positions=16, max_positions=16)[0, 0, 0, key].item()
    packed = torch.zeros(3, 2, 1, 16, 16, device=device)
    packed[2] = torch.eye(16)
    bits = PairBits.of(BITS, LAYER, heads=range(1), max_positions=16, device=device)
    for num_dropped, is_kept in ((lane + 32768, True), (lane + 32769, False)):
        context = attend(packed, None, bits, probability=num_dropped / 65536)
        assert bool(context[0, 0, 0, key]) == is_kept


def test_heads_of_a_rank_are_the_slice_of_all_heads(device):
    packed, grad = draw(1, 3, 2, 4, 20, 16).to(device).requires_grad_(), draw(2, 2, 4, 20, 16).to(device)

    def run(own: Tensor, heads: range) -> Tensor:
        bits = PairBits.of(BITS, LAYER, heads=heads, max_positions=32, device=device)
        return attend(own, None, bits, probability=0.1)

    whole = run(packed, range(4))
    whole.backward(grad)
    half = packed.detach()[:, :, 2:].clone().requires_grad_()
    part = run(half, range(2, 4))
    part.backward(grad[:, 2:])
    assert torch.equal(part, whole[:, 2:])
    assert torch.equal(half.grad, packed.grad[:, :, 2:])


def test_padding_does_not_change_the_bits(device):
    """The same samples at another padded length: equal where the tiles add up in the same order."""
    packed = draw(1, 3, 2, 2, 32, 16).to(device)
    longer = torch.cat([packed, draw(3, 3, 2, 2, 24, 16).to(device)], 3)
    bits = PairBits.of(BITS, LAYER, heads=range(2), max_positions=64, device=device)
    lengths = torch.tensor([32, 32], device=device)
    short = attend(packed, None, bits, probability=0.3)
    assert torch.equal(attend(longer, None, bits, probability=0.3, lengths=lengths)[:, :, :32], short)


def test_a_query_that_sees_no_key_has_context_and_gradients_of_zero(device):
    packed = draw(1, 3, 2, 1, 20, 16).to(device).requires_grad_()
    context = attend(packed, None, None, probability=0.0, lengths=torch.tensor([0, 20], device=device))
    context.sum().backward()
    assert not context[0].any()
    assert not packed.grad[:, 0].any()
    assert packed.grad.isfinite().all()
    assert packed.grad[2, 1].all()


def test_only_small_tensors_are_saved(device):
    """Packed input, context and two numbers for each query: nothing that grows with queries x keys."""
    packed = draw(1, 3, 2, 2, 70, 16).to(device).requires_grad_()
    sizes = []
    bits = PairBits.of(BITS, LAYER, heads=range(2), max_positions=80, device=device)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        attend(packed, None, bits, probability=0.1)
    assert sorted(sizes) == [2, 2 * 2 * 2 * 70, 2 * 2 * 70 * 16, 3 * 2 * 2 * 70 * 16]


def test_what_the_kernel_cannot_do_is_told(device):
    bits = PairBits.of(BITS, LAYER, heads=range(2), max_positions=16, device=device)
    with pytest.raises(ArgumentError, match=r"not in torch\.float64"):
        attend(draw(1, 3, 2, 2, 8, 16).double().to(device), None, bits, probability=0.1)
    with pytest.raises(ArgumentError, match="at most 128 features, not 144"):
        attend(draw(1, 3, 2, 2, 8, 144).to(device), None, bits, probability=0.1)
    with pytest.raises(ArgumentError, match="2 samples of at most 16 positions cannot serve 2 samples of 17"):
        attend(draw(1, 3, 2, 2, 17, 16).to(device), None, bits, probability=0.1)
