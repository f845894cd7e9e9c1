"""Order of the rows of Megatron-LM's fused query, key and value."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from megatron_bert_tp.errors import FormatError

Order = tuple[str, str, str]

NEWEST = 3.0
ORDERS: Mapping[float, Order] = MappingProxyType(
    {
        0.0: ("block", "head", "feature"),
        1.0: ("head", "feature", "block"),
        2.0: ("head", "block", "feature"),
        NEWEST: ("head", "block", "feature"),
    }
)
"""From the slowest to the fastest dimension, by ``checkpoint_version``."""


def order_of(version: float, *, source: str) -> Order:
    """Order of a checkpoint version; FormatError when it is none of the four."""
    if version not in ORDERS:
        known = ", ".join(f"{each:.1f}" for each in ORDERS)
        raise FormatError(f"{source}: checkpoint_version is {version}; {known} can be read, or none for 0.0")
    return ORDERS[version]


def blocks_of(fused: Tensor, order: Order, *, num_heads: int) -> Tensor:
    """Query, key and value of one tensor rank, ``[3, rows, ...]``, from its rows in the given order.

    ``num_heads`` are those of the rank.  A plain concatenation of the blocks over the ranks is then right in
    every version; one of the fused rows is wrong where the blocks are the slowest dimension.
    """
    rows = fused.shape[0] // 3
    sizes = {"block": 3, "head": num_heads, "feature": rows // num_heads}
    viewed = fused.view(*(sizes[name] for name in order), *fused.shape[1:])
    wanted = [order.index(name) for name in ("block", "head", "feature")]
    moved = viewed.permute(*wanted, *range(3, viewed.dim()))
    return moved.reshape(3, rows, *fused.shape[1:])


def fuse(query: Tensor, key: Tensor, value: Tensor, *, num_heads: int) -> Tensor:
    """Rows of one tensor rank in the newest order; ``num_heads`` are those of the rank."""
    by_head = [block.view(num_heads, -1, *block.shape[1:]) for block in (query, key, value)]
    return torch.stack(by_head, dim=1).view(-1, *query.shape[1:])
