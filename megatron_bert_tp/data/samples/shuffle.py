"""Permutations of 0..size-1 that are computed number by number, so that no array of that size is ever made."""

from math import isqrt

import numpy as np

from megatron_bert_tp.data.draws import Bits, Ints, below, draw

# Over 400,000 permutations, pairs of two places cannot be told from even ones with 8 rounds from 25 numbers on;
# of 5 or 6 numbers they can, and with 24 rounds no more.
_ROUNDS, _ROUNDS_OF_FEW, _FEW = 8, 24, 1024


def permuted(numbers: Ints, size: int, keys: Bits) -> Ints:
    """What ``numbers`` (in 0..size-1) become under the permutation of their key.

    ``numbers`` is ``[numbers]`` and ``keys`` too, or ``[1]``.  A Feistel network over pairs of digits (high, low),
    walked on from wherever it leaves 0..size-1: the generalised Feistel and the cycle-walking cipher of
    Black and Rogaway 2002.  There are at most ``sqrt(size)`` places outside, so hardly any number walks twice.
    """
    low = isqrt(max(size - 1, 0)) + 1
    high = -(-size // low)
    rounds = _ROUNDS if size >= _FEW else _ROUNDS_OF_FEW
    moved = _feistel(numbers, (high, low), rounds, keys)
    while len(outside := np.flatnonzero(moved >= size)):
        moved[outside] = _feistel(moved[outside], (high, low), rounds, keys[outside] if len(keys) > 1 else keys)
    return moved


def _feistel(numbers: Ints, bases: tuple[int, int], rounds: int, keys: Bits) -> Ints:
    """A permutation of 0..high*low-1: each digit in turn is moved on by a hash of the other."""
    high, low = bases
    upper, lower = np.divmod(numbers, low)
    for round_ in range(0, rounds, 2):
        upper = _moved(upper, high, draw(keys, lower * rounds + round_))
        lower = _moved(lower, low, draw(keys, upper * rounds + round_ + 1))
    return upper * low + lower


def _moved(digit: Ints, base: int, bits: Bits) -> Ints:
    """``digit`` plus a random digit, modulo ``base``."""
    total = digit + below(bits, base)
    return total - base * (total >= base)
