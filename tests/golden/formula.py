"""Numbers that two environments compute alike, so that golden files need not hold them.

Only the raw bits of Philox are used: numpy promises that they stay the same, and does not of its distributions.
"""

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def bits(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """53 random bits for every element, from the name alone."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return (np.random.Philox(key=key).random_raw(math.prod(shape)) >> np.uint64(11)).reshape(shape)


def uniform(name: str, shape: tuple[int, ...], *, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Float64 in ``[low, high)``."""
    return torch.from_numpy(low + (high - low) * (bits(name, shape) * 2.0**-53))


def integers(name: str, shape: tuple[int, ...], *, low: int, high: int) -> Tensor:
    """Int64 in ``[low, high)``."""
    return torch.from_numpy(low + (bits(name, shape) % np.uint64(high - low)).astype(np.int64))


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Values of a model's tensor, under its name with the prefix ``bert.``: none is zero or one by chance."""
    is_layer_norm = name.endswith((".ln.weight", ".LayerNorm.weight"))
    return uniform(name, shape, low=0.5, high=1.5) if is_layer_norm else uniform(name, shape, low=-0.35, high=0.35)


def scalar(outputs: Mapping[str, Tensor]) -> Tensor:
    """A loss to which every element of every output adds with a weight of its own."""
    parts = [(uniform(f"weight of {k}", tuple(v.shape)).to(v) * v).sum() for k, v in outputs.items()]
    return torch.stack(parts).sum()
