"""What happens to gradients between a backward and the optimizer: sum, tie, norm, clip.

Gradients of all microbatches are added up in buckets, in float32 where the parameters are narrower.  A bucket sets
out over the data axis as soon as the last microbatch has been added, while the backward goes on.  The order of
every addition is fixed by names and microbatches, never by the layout: a pipeline alone gives the norm of one
process bit for bit.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bert_tp.parallel.buckets import Bucket, Slot, Sums, in_buckets
from megatron_bert_tp.parallel.collectives import start_reduce_scatter, start_sum_over_, sum_over_
from megatron_bert_tp.parallel.mesh import Axis, ParallelMesh
from megatron_bert_tp.parallel.sharding import Part

_PIECE = 1 << 15
NARROW = (torch.bfloat16, torch.float16)
"""Number formats in which sums lose too much: their gradients are added up in float32."""


@dataclass(frozen=True)
class TiedWeight:
    """The copies of the word embeddings on this rank: the lookup's and the projection's leaf, either or none.

    Both uses have a leaf and so a gradient of their own; they are added once, in every layout.
    """

    lookup: nn.Parameter | None
    projection: nn.Parameter | None


@dataclass(frozen=True)
class Reduction:
    """How gradients cross the mesh.

    ``owners`` are the ranks among which the rows of each gradient are shared out: the data axis when the optimizer
    is sharded, else this rank alone, which then keeps all.  ``splits_sequence`` says that parameters which are
    ``over_sequence`` have a gradient of their own tokens alone.
    """

    mesh: ParallelMesh
    owners: Axis = field(default_factory=lambda: Axis.alone("data"))
    splits_sequence: bool = False
    bucket_bytes: int = 25 << 20


@dataclass
class _Pending:
    """A parameter's slots, and how many gradients it has had in this step."""

    slots: list[tuple[Sums, Slot]] = field(default_factory=list)
    num_taken: int = 0


class Gradients:
    """Gradients of all parameters of one rank, and their sum, norm and clipping over the mesh.

    After the last backward the rows that this rank owns are summed over everything in ``own``.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        names: Sequence[str],
        *,
        tied: TiedWeight | None,
        reduction: Reduction,
        device: torch.device | None = None,
    ) -> None:
        """``names`` are the tensors of the whole model, in the order in which the norm adds them.

        ``parts`` are all that an optimizer moves, none where all of a stage is frozen; then ``device`` says where
        this rank computes.  Backwards of them lose ``parameter.grad`` to the buckets.
        """
        self._reduction, self._place = reduction, {name: index for index, name in enumerate(names)}
        self.names = tuple(names)
        """Tensors of the whole model, in the order of `squares`."""
        self._tied = tied
        self._is_tied_here = tied is not None and None not in (tied.lookup, tied.projection)
        self._pending: dict[int, _Pending] = {}
        self._num_microbatches = 0
        early, late, tied_parts = self._sorted(parts)
        dtype = parts[0].parameter.dtype if parts else torch.float32
        self._device = parts[0].parameter.device if parts else device or torch.device("cpu")
        self._dtype = torch.float32 if dtype in NARROW else dtype
        # The last layers have their gradients first.
        runs = in_buckets(early[::-1], reduction.bucket_bytes, self._dtype.itemsize)
        self._early = [self._bucket(run) for run in runs]
        self._late = [self._bucket(late)] if late else []
        self._of_tied = [self._bucket(tied_parts)] if tied_parts else []
        self._apart = self._accumulator_of_projection()
        self._num_launched = 0
        self._works: list[dist.Work] = []
        self.own = [(self._owned(slot.part), slot.own(b.own, self._owned(slot.part))) for b, slot in self._slots()]

    @property
    def buckets(self) -> list[Bucket]:
        """All buckets, in the order in which they cross the data axis."""
        return [*self._early, *self._of_tied, *self._late]

    def begin(self, num_microbatches: int) -> None:
        """Forget all sums before a step; every parameter then gets at most ``num_microbatches`` gradients."""
        self._num_microbatches, self._num_launched = num_microbatches, 0
        for bucket in (*self.buckets, *self._apart):
            bucket.begin()
        for pending in self._pending.values():
            pending.num_taken = 0

    def accumulate(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Add one microbatch's gradient of a whole parameter; sends buckets that have all of theirs."""
        pending = self._pending[id(parameter)]
        pending.num_taken += 1
        is_last = pending.num_taken == self._num_microbatches
        for bucket, slot in pending.slots:
            bucket.add(slot, slot.part.view(gradient))
            bucket.num_missing -= is_last
        while self._num_launched < len(self._early) and not self._early[self._num_launched].num_missing:
            self._launch(self._early[self._num_launched])
            self._num_launched += 1

    def reduce_and_norm(self, scale: float = 1.0) -> float:
        """Sum over the mesh what is not summed yet, divide by ``scale``; the norm over the whole model.

        Every parameter counts exactly once: replicated ones on the first tensor rank, tied ones on the first
        stage.  Messages: the buckets that are left, always in one order; before them the tied weight over its
        axis, and what sequence parallelism has split over the tensor axis; then one float64 vector over tensor,
        pipeline and owners each.
        """
        for bucket in self.buckets:
            bucket.complete()
        for bucket in self._early[self._num_launched :]:
            self._launch(bucket)
        for bucket in self._of_tied:
            self._add_tied(bucket)
            self._launch(bucket)
        for bucket in self._late:
            sum_over_(bucket.flat, self._reduction.mesh.tensor)
            self._launch(bucket)
        while self._works:
            self._works.pop(0).wait()
        if scale != 1:
            self._multiply(1 / scale)
        total: float = sum(self.squares().tolist())
        return math.sqrt(total)

    def squares(self) -> Tensor:
        """Sum of squares of the gradient of every named tensor of the model, float64, on every rank."""
        squares = torch.zeros(len(self._place), dtype=torch.float64, device=self._device)
        for part, gradient in self.own:
            if not gradient.numel():
                continue
            if part.is_counted_here:
                squares[self._place[part.name]] += _square_sum(gradient)
            elif not self._is_tied(part):
                # Counted elsewhere, but this rank will move by its own copy: nan where that is not finite, else 0.
                squares[self._place[part.name]] += 0 * _square_sum(gradient)
        mesh = self._reduction.mesh
        for axis in (mesh.tensor, mesh.pipeline, self._reduction.owners):
            sum_over_(squares, axis)
        return squares

    def clip_(self, norm: float, limit: float) -> None:
        """Scale all gradients so that their norm is at most ``limit``; 0 never clips."""
        if limit and norm > limit:
            self._multiply(limit / norm)

    def _is_tied(self, part: Part) -> bool:
        return any(slot.part.parameter is part.parameter for bucket in self._of_tied for slot in bucket.slots)

    def _multiply(self, factor: float) -> None:
        if self.buckets:
            torch._foreach_mul_([bucket.own for bucket in self.buckets], factor)

    def _sorted(self, parts: Sequence[Part]) -> tuple[list[Part], list[Part], list[Part]]:
        """Parts that are done after the last backward; those that tensor ranks hold terms of; and the tied one."""
        early: list[Part] = []
        late: list[Part] = []
        tied: list[Part] = []
        lookup, projection = (None, None) if self._tied is None else (self._tied.lookup, self._tied.projection)
        for part in parts:
            if part.parameter is projection and self._is_tied_here:
                continue
            if part.parameter is lookup or part.parameter is projection:
                tied.append(part)
            elif part.over_sequence and self._reduction.splits_sequence:
                late.append(part)
            else:
                early.append(part)
        return early, late, tied

    def _bucket(self, parts: Sequence[Part]) -> Bucket:
        num_owners = self._reduction.owners.size
        bucket = Bucket(parts, num_owners=num_owners, dtype=self._dtype, device=self._device)
        for slot in bucket.slots:
            self._listen(slot.part.parameter, bucket, slot)
        return bucket

    def _listen(self, parameter: nn.Parameter, bucket: Sums, slot: Slot) -> None:
        if id(parameter) not in self._pending:
            self._pending[id(parameter)] = _Pending()
            parameter.register_post_accumulate_grad_hook(_hook(self))
        self._pending[id(parameter)].slots.append((bucket, slot))

    def take(self, parameter: Tensor) -> None:
        """What autograd has just added to ``grad`` goes to the buckets.

        It calls for a gradient that was put off too: that one comes later, through `accumulate`.
        """
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            assert isinstance(parameter, nn.Parameter)
            self.accumulate(parameter, gradient)

    def _accumulator_of_projection(self) -> list[Sums]:
        """Where both copies are here, the second one's gradients add up apart, and never set out."""
        if self._tied is None or self._tied.lookup is None or self._tied.projection is None:
            return []
        (slot,) = self._of_tied[0].slots
        sums = Sums([slot.part], num_owners=len(self._of_tied[0].flat), dtype=self._dtype, device=self._device)
        self._listen(self._tied.projection, sums, sums.slots[0])
        return [sums]

    def _add_tied(self, bucket: Bucket) -> None:
        """Add the two gradients of the tied embeddings: here when both uses are here, else over their axis.

        A sum of two is the same in either order, so both cases give the same bits.  It comes before the rows are
        shared out: the owners of a row are then the same for both copies.
        """
        for apart in self._apart:
            apart.complete()
            bucket.flat.add_(apart.flat)
        if not self._apart:
            sum_over_(bucket.flat, self._reduction.mesh.tied)

    def _launch(self, bucket: Bucket) -> None:
        """Start the sum of a bucket over the data axis."""
        owners, data = self._reduction.owners, self._reduction.mesh.data
        if owners.size > 1:
            work = start_reduce_scatter(bucket.own, bucket.flat.view(-1), owners)
        else:
            work = start_sum_over_(bucket.flat, data)
        if work is not None:
            self._works.append(work)

    def _owned(self, part: Part) -> Part:
        owners = self._reduction.owners
        return part.owned_by(owners.rank, owners.size)

    def _slots(self) -> list[tuple[Bucket, Slot]]:
        return [(bucket, slot) for bucket in self.buckets for slot in bucket.slots]


def _hook(gradients: Gradients) -> Callable[[Tensor], None]:
    """What autograd calls: it does not keep ``gradients`` alive, and with it the communicators of the mesh.

    A parameter that held what holds the parameter would be a circle through autograd, which nobody collects.
    """
    known = weakref.ref(gradients)

    def take(parameter: Tensor) -> None:
        alive = known()
        if alive is not None:
            alive.take(parameter)

    return take


def _square_sum(tensor: Tensor) -> Tensor:
    # In pieces: torch's own reductions to float64 are ten times slower on CPU, and a piece this small is
    # summed by one thread, so the bits do not depend on their number.
    pieces = tensor.reshape(-1).split(_PIECE)
    return torch.stack([piece.to(torch.float64, copy=True).square_().sum() for piece in pieces]).sum()
