"""The rows of tensors that this rank's optimizer moves, and how they come back to the parameters of all ranks.

With a sharded optimizer each data rank moves its own rows, and an all-gather brings them together again
(ZeRO-1, Rajbhandari et al. 2020, section 5.1).  Narrow parameters have float32 masters: a step smaller than half a
unit in the last place would else be lost.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert_tp.parallel.buckets import Bucket
from megatron_bert_tp.parallel.collectives import start_all_gather
from megatron_bert_tp.parallel.gradients import NARROW, Gradients
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.sharding import Part


@dataclass(frozen=True)
class Owned:
    """What an optimizer sees of one tensor: a rectangle, its weight and its gradient, all of ``part.local_shape``.

    ``weight`` is a view of the parameter, or its float32 master; either may have no rows.
    """

    part: Part
    weight: Tensor
    gradient: Tensor


class OwnedWeights:
    """Everything that this rank's optimizer moves, and the way back into the parameters of all ranks."""

    def __init__(self, gradients: Gradients, owners: Axis) -> None:
        self._buckets, self._owners = gradients.buckets, owners
        self.owned = [Owned(part, _weight_of(part), gradient) for part, gradient in gradients.own]

    @property
    def is_sharded(self) -> bool:
        """Whether other data ranks own other rows."""
        return self._owners.size > 1

    def publish(self) -> None:
        """Bring what the optimizer has moved into the parameters of all ranks: one all-gather per bucket."""
        for owned in self.owned:
            if is_master(owned):
                _rows_of(owned.part).copy_(owned.weight)
        if not self.is_sharded:
            return
        flying: list[tuple[Bucket, Tensor, dist.Work | None]] = []
        for bucket in self._buckets:
            flying.append(self._send(bucket))
            # One bucket is sent while another is unpacked; more would be a second copy of all weights.
            if len(flying) > 1:
                _land(*flying.pop(0))
        for sent in flying:
            _land(*sent)

    def _send(self, bucket: Bucket) -> tuple[Bucket, Tensor, dist.Work | None]:
        dtype = bucket.slots[0].part.parameter.dtype
        run = torch.zeros_like(bucket.own, dtype=dtype)
        for slot in bucket.slots:
            owned = slot.part.owned_by(self._owners.rank, self._owners.size)
            slot.own(run, owned).copy_(_rows_of(owned))
        flat = torch.empty_like(bucket.flat, dtype=dtype)
        return bucket, flat, start_all_gather(flat.view(-1), run, self._owners)


def _land(bucket: Bucket, flat: Tensor, work: dist.Work | None) -> None:
    if work is not None:
        work.wait()
    for slot in bucket.slots:
        for region, rows in slot.pairs(flat, slot.part.view(slot.part.parameter.detach())):
            rows.copy_(region.view_as(rows))


def is_master(owned: Owned) -> bool:
    """Whether the weight is a copy with more digits than the parameter."""
    return owned.weight.dtype != owned.part.parameter.dtype


def _weight_of(part: Part) -> Tensor:
    rows = _rows_of(part)
    return rows.float() if rows.dtype in NARROW else rows


def _rows_of(part: Part) -> Tensor:
    return part.view(part.parameter.detach())
