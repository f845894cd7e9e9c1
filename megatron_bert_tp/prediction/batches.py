"""Rows of the input as tensors, and their way from the first tensor rank to the others."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.text.encoder import Row


@dataclass(frozen=True)
class Batch:
    """``input_ids`` and ``token_type_ids`` ``[rows, width]``, ``lengths`` ``[rows]``; what is behind them is 0."""

    input_ids: Tensor
    token_type_ids: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], *, pad_id: int) -> "Batch":
        """Rows padded to the longest of them."""
        width = max(len(row) for row in rows)
        ids = [[*row.ids, *[pad_id] * (width - len(row))] for row in rows]
        types = [[*row.types, *[0] * (width - len(row))] for row in rows]
        return cls(torch.tensor(ids), torch.tensor(types), torch.tensor([len(row) for row in rows]))

    @property
    def attention_mask(self) -> Tensor | None:
        """``[rows, width]``, False at padding; None where there is none."""
        if bool((self.lengths == self.input_ids.shape[1]).all()):
            return None
        return torch.arange(self.input_ids.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(*(tensor.to(device) for tensor in (self.input_ids, self.token_type_ids, self.lengths)))


def by_length(rows: Sequence[Row], size: int) -> list[list[int]]:
    """Numbers of the rows, in batches of at most ``size`` rows of similar length."""
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    return [order[first : first + size] for first in range(0, len(order), size)]


def shared(batch: Batch | None, axis: Axis, device: torch.device) -> Batch | None:
    """The batch of the first rank of ``axis`` on all its ranks, which all must call it; None ends the work."""
    if axis.size == 1:
        return None if batch is None else batch.to(device)
    shape = (0, 0) if batch is None else batch.input_ids.shape
    header = torch.tensor(shape, device=device)
    dist.broadcast(header, src=axis.ranks[0], group=axis.group)
    num_rows, width = header.tolist()
    if not num_rows:
        return None
    if batch is None:
        content = torch.empty(num_rows, 2 * width + 1, dtype=torch.long, device=device)
    else:
        content = torch.cat([batch.input_ids, batch.token_type_ids, batch.lengths[:, None]], 1).to(device)
    dist.broadcast(content, src=axis.ranks[0], group=axis.group)
    return Batch(content[:, :width], content[:, width : 2 * width], content[:, -1])
