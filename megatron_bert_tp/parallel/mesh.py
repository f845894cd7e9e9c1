"""Who talks to whom: an `Axis` for every direction in which work is split, and the mesh of all of them.

Ranks are laid out ``(pipeline, data, tensor)`` with tensor innermost, so that the tensor axis, which talks
most, stays inside a node:

    rank = (pipeline * data_size + data) * tensor_size + tensor
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from megatron_bert_tp.errors import LayoutError

_AXES = ("tensor", "data", "pipeline", "tied")
"""In the order in which all ranks make their communicators."""

Channels = Mapping[tuple[int, int], dist.ProcessGroup]
"""Communicators for messages from stage to stage, by the places of source and target on the pipeline axis."""


class Waits:
    """Context manager around waiting for peers: adds up ``seconds``.

    Whoever compares the speed of ranks must know them: the peers of a slow rank take as long as it does.  On a
    GPU it is the device that waits, and these are the host's times.
    """

    def __init__(self) -> None:
        self.seconds, self._since = 0.0, 0.0

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_error: object) -> None:
        self.seconds += time.perf_counter() - self._since


@dataclass(frozen=True)
class Axis:
    """One direction of the mesh as one rank sees it; the value that a layer receives.

    ``ranks`` are global ranks in the order of their place on the axis, ``rank`` is this process' place, and
    ``group`` is the communicator, which an axis of one rank does not need.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None = None
    waits: Waits = field(default_factory=Waits, compare=False, repr=False)
    """For the other ranks of the axis."""

    @classmethod
    def alone(cls, name: str) -> "Axis":
        """Axis of one rank, for one process without any process group."""
        return cls(name, (0,), 0)

    def __deepcopy__(self, _memo: dict[int, object]) -> "Axis":
        """The axis itself: a communicator cannot be copied, and a copy of a model talks to the same ranks."""
        return self

    @property
    def size(self) -> int:
        """Number of ranks on the axis."""
        return len(self.ranks)

    @property
    def is_first(self) -> bool:
        """Whether this rank has place 0."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last place."""
        return self.rank == self.size - 1

    @property
    def previous(self) -> int:
        """Global rank one place before, in a ring."""
        return self.ranks[self.rank - 1]

    @property
    def following(self) -> int:
        """Global rank one place after, in a ring."""
        return self.ranks[(self.rank + 1) % self.size]


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the mesh, and which global ranks form each line of it (pure arithmetic).

    ``ends`` are the places on the pipeline axis that hold the first and the last stage, ascending; where none
    are given, the outermost.
    """

    pipeline: int
    data: int
    tensor: int
    ends: tuple[int, ...] = ()

    @classmethod
    def of_world(
        cls, world_size: int, *, tensor: int, pipeline: int, ends: tuple[int, ...] = ()
    ) -> "MeshShape":
        """Shape in which data takes what tensor x pipeline leaves of ``world_size``.

        Raises `LayoutError` when it does not divide.
        """
        replica = tensor * pipeline
        if world_size % replica:
            raise LayoutError(
                f"world size ({world_size}) must be a multiple of tensor x pipeline ({tensor} x {pipeline} = "
                f"{replica}); start {replica} processes or a multiple of it"
            )
        return cls(pipeline=pipeline, data=world_size // replica, tensor=tensor, ends=ends)

    def rank_at(self, pipeline: int, data: int, tensor: int) -> int:
        """Global rank of one place in the mesh."""
        return (pipeline * self.data + data) * self.tensor + tensor

    def place_of(self, rank: int) -> tuple[int, int, int]:
        """Place ``(pipeline, data, tensor)`` of one global rank."""
        outer, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(outer, self.data)
        return pipeline, data, tensor

    def lines(self, name: str) -> Iterator[tuple[int, ...]]:
        """Every line of ranks along one axis, in the same order on every rank."""
        stages, replicas, shards = range(self.pipeline), range(self.data), range(self.tensor)
        if name == "tensor":
            yield from (tuple(self.rank_at(p, d, t) for t in shards) for p in stages for d in replicas)
        elif name == "data":
            yield from (tuple(self.rank_at(p, d, t) for d in replicas) for p in stages for t in shards)
        elif name == "pipeline":
            yield from (tuple(self.rank_at(p, d, t) for p in stages) for d in replicas for t in shards)
        else:
            ends = self.ends or sorted({0, self.pipeline - 1})
            yield from (tuple(self.rank_at(p, d, t) for p in ends) for d in replicas for t in shards)

    def neighbours(self) -> list[tuple[int, int]]:
        """Places (source, target) next to each other on the ring of the pipeline, each pair in both directions."""
        onward = {(place, (place + 1) % self.pipeline) for place in range(self.pipeline)}
        both = onward | {(target, source) for source, target in onward}
        return sorted((source, target) for source, target in both if source != target)


@dataclass(frozen=True)
class ParallelMesh:
    """The axes through one rank.

    ``tied`` joins the stages that hold a copy of the word embeddings.  ``channels`` are the communicators of two
    neighbours on the pipeline each, one for each direction.  torch gives a rank one queue for all its messages in
    an NCCL communicator, whoever they go to: a receive that waits would hold up the send behind it, and for ever
    if other ranks wait for that.
    """

    data: Axis
    pipeline: Axis
    tensor: Axis
    tied: Axis
    channels: Channels

    @classmethod
    def alone(cls) -> "ParallelMesh":
        """Mesh of one process without any process group."""
        return cls(**{name: Axis.alone(name) for name in _AXES}, channels={})

    @property
    def is_first(self) -> bool:
        """Whether this is global rank 0."""
        return self.data.is_first and self.pipeline.is_first and self.tensor.is_first

    @classmethod
    def build(cls, shape: MeshShape, *, rank: int, timeout: timedelta) -> "ParallelMesh":
        """Make the communicators of all axes and channels; every rank of the world must call it.

        All ranks make all groups in the same order, also those that they are not part of: this is what
        ``torch.distributed`` demands, and a rank that skipped one would hang the others.
        """
        axes = {name: _own_axis(name, shape, rank=rank, timeout=timeout) for name in _AXES}
        return cls(**axes, channels=_own_channels(shape, rank=rank, timeout=timeout))


def _own_axis(name: str, shape: MeshShape, *, rank: int, timeout: timedelta) -> Axis:
    own = Axis(name, (rank,), 0)
    for ranks in shape.lines(name):
        group = dist.new_group(list(ranks), timeout=timeout) if len(ranks) > 1 else None
        if rank in ranks:
            own = Axis(name, ranks, ranks.index(rank), group)
    return own


def _own_channels(shape: MeshShape, *, rank: int, timeout: timedelta) -> Channels:
    own: dict[tuple[int, int], dist.ProcessGroup] = {}
    for line in shape.lines("pipeline"):
        for source, target in shape.neighbours():
            ends = sorted((line[source], line[target]))
            group = dist.new_group(ends, timeout=timeout)
            if rank in ends:
                own[source, target] = group
    return own
