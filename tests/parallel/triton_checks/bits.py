"""The bits of the kernels against numpy's generator, to the bit."""

import numpy as np
import pytest
import torch

from megatron_bert_tp.parallel.kernels import load_kernels
from megatron_bert_tp.parallel.random_bits import Place, RandomBits

COLUMNS = 32  # of a program


def drawn(device, seed, samples, *, layer, place, start, count, aligned=None):
    """Lanes ``[samples, count]`` as the kernel has them."""
    output = torch.empty(len(samples), count, dtype=torch.int16, device=device)
    numbers = torch.tensor(samples, dtype=torch.int64, device=device)
    grid = (len(samples), -(-count // COLUMNS))
    is_aligned = start % 16 == 0 if aligned is None else aligned
    load_kernels("bits").lanes_kernel[grid](
        output, numbers, seed, layer << 8 | place, start, count, num_columns=COLUMNS, is_aligned=is_aligned,
        enable_fp_fusion=True,
    )  # fmt: skip
    return output.cpu().numpy()


def assert_equal(device, seed, samples, *, aligned=None, **where):
    bits = RandomBits(seed, tuple(samples))
    expected = np.stack([bits.lanes(sample, **where) for sample in samples])
    assert np.array_equal(drawn(device, seed, samples, **where, aligned=aligned), expected)


@pytest.mark.parametrize("place", list(Place))
@pytest.mark.parametrize("layer", [0, 1, 100])
def test_every_place_and_layer(device, place, layer):
    assert_equal(device, 1234, [0, 1, 7], layer=layer, place=place, start=48, count=40)


@pytest.mark.parametrize("start", [*range(17), 16 * 2**33, 16 * 2**33 + 9, 2**40 + 31])
def test_every_start_and_alignment(device, start):
    assert_equal(device, 7, [3], layer=2, place=Place.MLP_OUTPUT, start=start, count=50)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 2**32 + 5, 2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize("sample", [0, 1, 2**32, 2**32 + 1, 2**40 + 3, 2**63 - 1])
def test_every_seed_and_large_sample_numbers(device, seed, sample):
    assert_equal(device, seed, [sample], layer=3, place=Place.ATTENTION_OUTPUT, start=0, count=16)


def test_a_block_for_each_element_gives_the_same_bits(device):
    """What serves rows that begin inside a block of the generator, here for rows that do not."""
    where = {"layer": 95, "place": Place.EMBEDDINGS, "start": 32, "count": 70}
    assert_equal(device, 5, [2**33], aligned=False, **where)
    assert_equal(device, 5, [2**33], aligned=True, **where)
