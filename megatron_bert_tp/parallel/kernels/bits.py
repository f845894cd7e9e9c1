# mypy: disallow-untyped-decorators=False
"""Random bits on a GPU: the same Philox4x64-10 as `parallel.random_bits`, drawn where they are used.

One block of the generator serves 16 neighbouring elements.  It is computed once and spread over 16 lanes, where
rows begin at a multiple of 16 elements; elsewhere it is computed for each element, which costs 16 times as much.
"""

import triton
import triton.language as tl


@triton.jit
def spread(words_0: tl.tensor, words_1: tl.tensor, words_2: tl.tensor, words_3: tl.tensor) -> tl.tensor:
    """Lanes ``[rows, 16 blocks]`` of four words ``[rows, blocks]``, each the upper half of an int32.

    The lower half is what is left of the word: compare with a threshold whose lower half is zero.
    """
    words = tl.interleave(tl.interleave(words_0, words_2), tl.interleave(words_1, words_3))
    halves = tl.interleave(words.to(tl.int32), (words >> 32).to(tl.int32))
    return tl.interleave(halves << 16, halves)


@triton.jit
def lane_of(
    words_0: tl.tensor, words_1: tl.tensor, words_2: tl.tensor, words_3: tl.tensor, elements: tl.tensor
) -> tl.tensor:
    """The lane of one element of each block, as `spread` has it; all of shape ``[rows, columns]``."""
    low = tl.where((elements & 4) == 0, words_0, words_1)
    high = tl.where((elements & 4) == 0, words_2, words_3)
    word = tl.where((elements & 8) == 0, low, high)
    half = tl.where((elements & 2) == 0, word.to(tl.int32), (word >> 32).to(tl.int32))
    return tl.where((elements & 1) == 0, half << 16, half)


@triton.jit
def tile_lanes(
    seed: tl.tensor, layer_place: tl.tensor, samples: tl.tensor, firsts: tl.tensor,
    num_columns: tl.constexpr, is_aligned: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Lanes ``[rows, num_columns]`` of the elements from ``firsts`` on, as `spread` has them.

    ``samples`` and ``firsts`` are ``[rows, 1]``; ``layer_place`` is ``layer << 8 | place``.  ``is_aligned``
    promises that all of ``firsts`` are multiples of 16.
    """
    if is_aligned:
        blocks = (firsts >> 4) + tl.arange(0, num_columns // 16)[None, :]
    else:
        blocks = (firsts + tl.arange(0, num_columns)[None, :]) >> 4
    zeros = tl.zeros_like(blocks)
    words_0, words_1, words_2, words_3 = tl.philox(seed, blocks, samples + zeros, layer_place + zeros, zeros)
    if is_aligned:
        lanes = spread(words_0, words_1, words_2, words_3)
    else:
        elements = firsts + tl.arange(0, num_columns)[None, :]
        lanes = lane_of(words_0, words_1, words_2, words_3, elements)
    return lanes


@triton.jit(do_not_specialize=["seed", "layer_place", "start", "count"])
def lanes_kernel(
    output: tl.tensor, samples: tl.tensor, seed: tl.tensor, layer_place: tl.tensor, start: tl.tensor,
    count: tl.tensor, num_columns: tl.constexpr, is_aligned: tl.constexpr,
) -> None:  # fmt: skip
    """Lanes ``[samples, count]`` int16 of the elements from ``start`` on; a program writes ``num_columns``."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * num_columns + tl.arange(0, num_columns)
    zero = tl.zeros([1, 1], dtype=tl.int64)
    first = zero + start + tl.program_id(1) * num_columns
    lanes = tile_lanes(seed, layer_place, zero + tl.load(samples + row), first, num_columns, is_aligned)
    places = row.to(tl.int64) * count + columns[None, :]
    tl.store(output + places, (lanes >> 16).to(tl.int16), mask=columns[None, :] < count)
