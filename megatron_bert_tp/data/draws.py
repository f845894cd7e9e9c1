"""Random numbers that are a pure function of (seed, purpose, row, column), whole arrays at a time.

Each row is a SplitMix64 stream (Steele, Lea and Flood 2014) whose state is hashed from seed, purpose and
row, so that any element can be drawn alone, in any order, and with any numpy: the streams of numpy's own
`Generator` may change between its versions, and making one costs more than a sample's tokens.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Purpose(IntEnum):
    """What random numbers are for; different purposes never share a stream."""

    SPLIT = 1
    SPAN = 2
    ORDER = 3
    PAIR = 4
    TRUNCATION = 5
    WORD = 6
    REPLACEMENT = 7
    REPLACEMENT_TOKEN = 8
    SPAN_LENGTH = 9


def streams(seed: int, purpose: Purpose, rows: Ints) -> Bits:
    """State of the stream of each row; the same shape as ``rows``."""
    key = np.array([seed, int(purpose)], dtype=np.uint64)
    # Hashed after each addition: sums of hashes are alike where purpose and row change places.
    state = _mix(_mix(key[:1] + _GOLDEN) + key[1:] * _GOLDEN)
    return draw(state, rows)


def draw(streams: Bits, columns: Ints) -> Bits:
    """64 random bits for each stream and column (from 0), which are broadcast against each other."""
    return _mix(streams + (columns.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def below(bits: Bits, limit: int | Ints) -> Ints:
    """Integers in 0..limit-1 for limits up to 2**32; uneven by at most limit / 2**32."""
    scaled = (bits >> np.uint64(32)) * np.asarray(limit, dtype=np.uint64)
    return (scaled >> np.uint64(32)).astype(np.int64)


def uniform(bits: Bits) -> npt.NDArray[np.float64]:
    """Floats in [0, 1) with 53 random bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(bits: Bits) -> Bits:
    """The finaliser of SplitMix64, a bijection in which every input bit changes every output bit."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
