"""Small models saved at simulated layouts: every rank's part of the work is done in this one process."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch

from megatron_bert_tp.checkpoint.directories import Keep, partial_directory, step_directory
from megatron_bert_tp.checkpoint.save import commit_checkpoint, prepare_directory, write_rectangles
from megatron_bert_tp.checkpoint.slices import Rectangle, rectangles
from megatron_bert_tp.model.initialisation import initialise_
from megatron_bert_tp.model.shape import ModelShape
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.sharding import Part
from megatron_bert_tp.pipeline.partition import partition

ODD = ModelShape(1003, 16, 5, 4, 32, 16, 2)  # 1003 entries pad on tensor 2 and 4; 5 layers split 3 + 2
KEEP = Keep(last=2)
TINY = ModelShape(9, 8, 1, 4, 8, 8, 2)  # on tensor 4, two ranks have no row of the vocabulary


class InThreads:
    """What an `Agreement` does among processes, among threads that stand for ranks."""

    def __init__(self, num_ranks: int) -> None:
        self._barrier = threading.Barrier(num_ranks)
        self._told: list[str | None] = [None] * num_ranks

    def of(self, rank: int) -> "OneOfThreads":
        return OneOfThreads(self, rank)

    def texts(self, rank: int, text: str | None) -> list[str | None]:
        self._told[rank] = text
        self._barrier.wait(30)
        told = list(self._told)
        self._barrier.wait(30)  # nobody writes anew before all have read
        return told

    @property
    def size(self) -> int:
        return len(self._told)


@dataclass(frozen=True)
class OneOfThreads:
    together: InThreads
    rank: int

    @property
    def size(self) -> int:
        return self.together.size

    def texts(self, text: str | None) -> list[str | None]:
        return self.together.texts(self.rank, text)


def in_threads(count: int, work: Callable[[OneOfThreads], None]) -> list[Exception | None]:
    """What ``work`` raises on each of ``count`` ranks, which are threads."""
    together = InThreads(count)
    raised: list[Exception | None] = [None] * count

    def run(rank: int) -> None:
        try:
            work(together.of(rank))
        except Exception as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    return raised


def stages(shape: ModelShape, *, tensor: int = 1, pipeline: int = 1, seed: int = 3) -> list[MegatronBertStage]:
    """Stage of every rank, with initial weights."""
    made = []
    for plan in partition(shape.num_hidden_layers, pipeline):
        for rank in range(tensor):
            axis = Axis("tensor", tuple(range(tensor)), rank)
            made.append(MegatronBertStage(shape, plan, axis=axis))
            initialise_(made[-1], seed=seed)
    return made


def held(
    stage: MegatronBertStage, kinds: tuple[str, ...] = ("weight",), *, owner: int = 0, num_owners: int = 1
) -> list[Rectangle]:
    """What a rank hands in; moments are made from the weights so that every value is told apart."""
    parts = [part.owned_by(owner, num_owners) for part in stage.parts()]
    return [row for kind in kinds for row in rectangles(kind, moments(parts, kind))]


def moments(parts: Sequence[Part], kind: str) -> list[tuple[Part, torch.Tensor]]:
    factor = {"weight": 1, "exp_avg": 2, "exp_avg_sq": 3}[kind]
    return [(part, part.view(part.parameter.detach()) * factor) for part in parts]


def save(
    root: Path,
    shape: ModelShape,
    step: int = 1,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    num_owners: int = 1,
    kinds: tuple[str, ...] = ("weight",),
    attachments: dict[str, Path] | None = None,
    facts: dict[str, object] | None = None,
    keep: Keep = KEEP,
    seed: int = 3,
) -> Path:
    """Checkpoint of a model with initial weights, written by pipeline x owner x tensor ranks one after another."""
    partial = partial_directory(root, step, "made")
    prepare_directory(partial)
    ranks = stages(shape, tensor=tensor, pipeline=pipeline, seed=seed)
    for rank, (stage, owner) in enumerate(product(ranks, range(num_owners))):
        rows = held(stage, kinds, owner=owner, num_owners=num_owners)
        write_rectangles(partial, rank, rows)
    commit_checkpoint(
        partial,
        step,
        len(ranks) * num_owners,
        facts={"model": asdict(shape), **(facts or {})},
        attachments=attachments or {},
        keep=keep,
    )
    return step_directory(root, step)


def whole(read: Callable[..., torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Whole tensors from a reader."""
    return {name: read(name, (0,) * len(size), size) for name, size in shapes.items()}
