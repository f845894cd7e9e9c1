"""What happens to gradients between the last backward and the optimizer: sum, tie, norm, clip.

The order of every addition is fixed by names, never by the layout: a pipeline alone gives the norm of
one process bit for bit.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bert_tp.parallel.collectives import start_sum_over_, sum_over_
from megatron_bert_tp.parallel.mesh import Axis, ParallelMesh
from megatron_bert_tp.parallel.sharding import Part

_PIECE = 1 << 15


@dataclass(frozen=True)
class TiedWeight:
    """The copies of the word embeddings on this rank: the lookup's and the projection's leaf, either or none.

    Both uses have a leaf and so a gradient of their own; they are added once, in every layout.
    """

    lookup: nn.Parameter | None
    projection: nn.Parameter | None


def buckets(gradients: Sequence[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    """Consecutive runs of gradients of about ``bucket_bytes`` each."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        bucket.append(gradient)
        size += gradient.numel() * gradient.element_size()
        if size >= bucket_bytes:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def sum_over_data_(gradients: Sequence[Tensor], axis: Axis, *, bucket_bytes: int) -> None:
    """Add the gradients of all data ranks, in place, one all-reduce per bucket."""
    if axis.size == 1:
        return
    flying: list[tuple[list[Tensor], Tensor, dist.Work | None]] = []
    for bucket in buckets(gradients, bucket_bytes):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        flying.append((bucket, flat, start_sum_over_(flat, axis)))
        # One bucket is filled while another is on its way; more would be a second copy of all gradients.
        if len(flying) > 1:
            _land_(*flying.pop(0))
    for bucket, flat, work in flying:
        _land_(bucket, flat, work)


def _land_(bucket: Sequence[Tensor], flat: Tensor, work: dist.Work | None) -> None:
    """Wait for a bucket and copy its sums back into its gradients."""
    if work is not None:
        work.wait()
    for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def sum_tied_(tied: TiedWeight, axis: Axis) -> None:
    """Add the two gradients of the tied embeddings: here when both uses are here, else over ``axis``.

    A sum of two is the same in either order, so both cases give the same bits.
    """
    if tied.lookup is not None and tied.projection is not None:
        if tied.lookup.grad is None or tied.projection.grad is None:
            raise RuntimeError("tied embeddings without a gradient: run a backward first")
        tied.lookup.grad.add_(tied.projection.grad)
        tied.projection.grad = None
        return
    for parameter in (tied.lookup, tied.projection):
        if parameter is not None and parameter.grad is not None:
            sum_over_(parameter.grad, axis)


class Gradients:
    """Gradients of all parameters of one rank, and their sum, norm and clipping over the mesh."""

    def __init__(
        self,
        parts: Sequence[Part],
        names: Sequence[str],
        *,
        tied: TiedWeight | None,
        mesh: ParallelMesh,
        bucket_bytes: int,
    ) -> None:
        """``names`` are the tensors of the whole model, in the order in which the norm adds them."""
        self._parts = [part for part in parts if part.is_counted_here]
        self._parameters = list({id(part.parameter): part.parameter for part in parts}.values())
        self._place = {name: index for index, name in enumerate(names)}
        self._tied, self._mesh, self._bucket_bytes = tied, mesh, bucket_bytes

    def clear(self) -> None:
        """Forget all gradients before a step."""
        for parameter in self._parameters:
            parameter.grad = None

    def present(self) -> list[Tensor]:
        """The gradients that exist, in the order of parameters."""
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def reduce_and_norm(self) -> float:
        """Sum over the data axis and the tied copies; returns the norm over the whole model.

        Every parameter counts exactly once: replicated ones on the first tensor rank, tied ones on the first
        stage.  Messages: the buckets, the tied weight, and one float64 vector over tensor and pipeline each.
        """
        sum_over_data_(self.present(), self._mesh.data, bucket_bytes=self._bucket_bytes)
        if self._tied is not None:
            sum_tied_(self._tied, self._mesh.tied)
        total: float = sum(self.squares().tolist())
        return math.sqrt(total)

    def squares(self) -> Tensor:
        """Sum of squares of the gradient of every named tensor of the model, float64, on every rank."""
        device = self._parameters[0].device
        squares = torch.zeros(len(self._place), dtype=torch.float64, device=device)
        for part in self._parts:
            if part.parameter.grad is not None:
                squares[self._place[part.name]] = _square_sum(part.view(part.parameter.grad))
        return sum_over_(sum_over_(squares, self._mesh.tensor), self._mesh.pipeline)

    def clip_(self, norm: float, limit: float) -> None:
        """Scale all gradients so that their norm is at most ``limit``; 0 never clips."""
        if limit and norm > limit:
            torch._foreach_mul_(self.present(), limit / norm)


def _square_sum(tensor: Tensor) -> Tensor:
    # In pieces: torch's own reductions to float64 are ten times slower on CPU, and a piece this small is
    # summed by one thread, so the bits do not depend on their number.
    pieces = tensor.reshape(-1).split(_PIECE)
    return torch.stack([piece.to(torch.float64, copy=True).square_().sum() for piece in pieces]).sum()
