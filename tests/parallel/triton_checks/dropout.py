"""Bias, dropout and residual in one kernel against the CPU twin: equal to the bit in float32."""

import pytest
import torch

from megatron_bert_tp.errors import ArgumentError
from megatron_bert_tp.parallel import random_bits
from megatron_bert_tp.parallel.random_bits import Place, RandomBits, keep_mask
from megatron_bert_tp.parallel.triton_dropout import NO_POSITION, TokenBits, bias_dropout_add

WHERE = {"layer": 5, "place": Place.MLP_OUTPUT}
# Rows of one length; packed rows, the last one with padding; a run of tokens that ends in padding.
ROWS = RandomBits(11, (3, 2**40 + 1, 8))
PACKED = RandomBits(2**63 - 1, (3, 9, 4), lengths=(4, 11, 2))
RUN = ROWS.of_run(range(14, 38), sequence=12)
SHAPES = {"rows": (ROWS, 3, 12), "packed": (PACKED, 1, 19), "run": (RUN, 1, 24)}


def draw(seed, shape, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()


def dropout_add(x, residual, bits, **arguments):
    """The kernel in the place of `random_bits.dropout_add`."""
    tokens = None if bits is None else TokenBits.of(bits, x.shape[1], x.device)
    return bias_dropout_add(x, None, residual, tokens, **arguments)


def leaves(*tensors, device):
    return [tensor.detach().to(device).requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("features", [32, 48, 256, 272, 10, 257])
@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_forward_and_gradients_equal_the_cpu_twin(device, kind, features, probability):
    bits, rows, positions = SHAPES[kind]
    shape = (rows, positions, features)
    x, residual, grad = (draw(seed, shape, "cpu") for seed in range(3))
    own_x, own_residual = leaves(x, residual, device=device)
    expected = random_bits.dropout_add(x, residual, bits, probability=probability, **WHERE)
    found = dropout_add(own_x, own_residual, bits, probability=probability, **WHERE)
    expected.backward(grad.detach())
    found.backward(grad.detach().to(device))
    for ours, twin in ((found, expected), (own_x.grad, x.grad), (own_residual.grad, residual.grad)):
        assert torch.equal(ours.cpu(), twin)


@pytest.mark.parametrize("rows", [1, 7, 64, 150])
@pytest.mark.parametrize("features", [32, 23])
def test_bias_and_its_gradient(device, rows, features):
    tokens = TokenBits.of(RandomBits(1, (6,)), rows, device)
    product, residual, grad = (draw(seed, (rows, features), device) for seed in range(3))
    bias = draw(4, (features,), device)
    result = bias_dropout_add(product, bias, residual, tokens, probability=0.3, **WHERE)
    result.backward(grad)
    lanes = RandomBits(1, (6,)).hidden(5, Place.MLP_OUTPUT, positions=rows, features=features)
    keep = keep_mask(lanes, 0.3)[0].to(device)
    scaled = ((product + bias) * (1 / (1 - random_bits.dropped_share(0.3)))).where(keep.bool(), 0)
    assert torch.equal(result, residual + scaled)
    # A sum of n numbers in any order is off by at most n roundings of the sum of their sizes.
    sums, sizes = product.grad.double().sum(0), product.grad.double().abs().sum(0)
    assert ((bias.grad - sums).abs() <= rows * 2**-24 * sizes).all()
    assert torch.equal(residual.grad, grad)


def test_a_slice_of_tokens_is_the_slice_of_the_whole(device):
    tokens = TokenBits.of(PACKED, 19, device)
    product, residual = draw(0, (19, 48), device), draw(1, (19, 48), device)
    whole = bias_dropout_add(product, None, residual, tokens, probability=0.4, **WHERE)
    for chosen in (slice(0, 5), slice(3, 18), slice(18, 19)):
        own = TokenBits(tokens.seed, tokens.samples[chosen], tokens.positions[chosen])
        part = bias_dropout_add(product[chosen], None, residual[chosen], own, probability=0.4, **WHERE)
        assert torch.equal(part, whole[chosen])


def test_tokens_of_no_sample_are_kept(device):
    samples = torch.zeros(9, dtype=torch.int64, device=device)
    tokens = TokenBits(3, samples, torch.full_like(samples, NO_POSITION))
    x = draw(0, (9, 32), device)
    factor = torch.tensor(1 / (1 - random_bits.dropped_share(0.5)))
    result = bias_dropout_add(x, None, None, tokens, probability=0.5, **WHERE)
    assert torch.equal(result, x * factor.to(device))


@pytest.mark.parametrize("feature", range(4))
def test_an_element_is_kept_where_its_lane_reaches_the_threshold(device, feature):
    """Of two probabilities, the first makes the lane of the element the lowest that is kept."""
    bits = RandomBits(1, (6,))
    lane = bits.hidden(5, Place.MLP_OUTPUT, positions=1, features=32)[0, 0, feature].item()
    x = torch.ones(1, 1, 32, device=device)
    for num_dropped, is_kept in ((lane + 32768, True), (lane + 32769, False)):
        result = dropout_add(x, None, bits, probability=num_dropped / 65536, **WHERE)
        assert bool(result[0, 0, feature]) == is_kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_with_a_residual_of_32_as_under_autocast(device, dtype):
    """Computed in float32: one rounding, that of the gradient, which Triton's interpreter cuts off instead."""
    shape = (2, 3, 32)
    x, residual, grad = draw(0, shape, device, dtype), draw(1, shape, device), draw(2, shape, device)
    bits = RandomBits(1, (4, 5))
    own = x.detach().float().requires_grad_()
    expected = dropout_add(own, residual, bits, probability=0.2, **WHERE)
    found = dropout_add(x, residual, bits, probability=0.2, **WHERE)
    expected.backward(grad)
    found.backward(grad)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert x.grad.dtype == dtype
    assert ((x.grad - own.grad).abs() <= torch.finfo(dtype).eps * own.grad.abs()).all()


def test_tensors_that_are_not_contiguous_are_read_as_they_are(device):
    tokens = TokenBits.of(RandomBits(1, (6,)), 8, device)
    product, residual = draw(0, (32, 8), device).mT, draw(1, (32, 8), device).mT
    bias = draw(2, (32, 3), device)[:, 1]
    found = bias_dropout_add(product, bias, residual, tokens, probability=0.3, **WHERE)
    copies = (tensor.contiguous() for tensor in (product, bias, residual))
    assert not any(tensor.is_contiguous() for tensor in (product, bias, residual))
    assert torch.equal(found, bias_dropout_add(*copies, tokens, probability=0.3, **WHERE))


def test_without_residual_and_with_a_gradient_that_is_not_contiguous(device):
    x = draw(0, (2, 3, 32), device)
    dropout_add(x, None, RandomBits(1, (4, 5)), probability=0.5, **WHERE).sum().backward()
    assert set(x.grad.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize(("bits", "probability"), [(None, 0.3), (ROWS, 0.0)])
def test_without_bits_or_probability_nothing_is_dropped(device, bits, probability):
    x, residual = draw(0, (3, 12, 32), device), draw(1, (3, 12, 32), device)
    assert torch.equal(dropout_add(x, residual, bits, probability=probability, **WHERE), residual + x)
    assert dropout_add(x, None, bits, probability=probability, **WHERE) is x


def test_what_the_kernel_cannot_do_is_told(device):
    tokens = TokenBits.of(ROWS, 12, device)
    with pytest.raises(ArgumentError, match=r"float32, bfloat16, float16, not in torch\.float64"):
        bias_dropout_add(draw(0, (36, 32), device, torch.float64), None, None, tokens, probability=0.1, **WHERE)
    with pytest.raises(ArgumentError, match="36 tokens have bits, but 35 have hidden states"):
        bias_dropout_add(draw(0, (35, 32), device), None, None, tokens, probability=0.1, **WHERE)
