"""Small models, batches that look real, and passes over them on any layout; `tests/trainers.py` trains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert_tp.checkpoint.load import load_parts_
from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.model.chunks import Chunks
from megatron_bert_tp.model.initialisation import initialise_
from megatron_bert_tp.model.shape import ModelShape
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.objectives.pretraining import Counts, microbatch_loss
from megatron_bert_tp.parallel.gradients import Gradients, Reduction
from megatron_bert_tp.parallel.mesh import Axis, MeshShape, ParallelMesh
from megatron_bert_tp.pipeline.executor import Criterion, Executor
from megatron_bert_tp.pipeline.instructions import Program
from megatron_bert_tp.pipeline.partition import partition
from megatron_bert_tp.pipeline.placement import straight
from megatron_bert_tp.pipeline.schedule import placement_of, programs

CPU = torch.device("cpu")
TIMEOUT = timedelta(seconds=60)
IGNORED = -100
# Odd on purpose: 1003 words divide by no tensor size, 5 layers by no pipeline size.
ODD_SHAPE = ModelShape(
    vocab_size=1003,
    hidden_size=16,
    num_hidden_layers=5,
    num_attention_heads=4,
    intermediate_size=36,
    max_position_embeddings=24,
    type_vocab_size=2,
    initializer_range=0.2,
)
# Rows of the four microbatches of a step: their lengths; the longest is the width, so two have padding.
LENGTHS = ((13, 9, 11), (16, 16), (5, 7, 7), (24, 3, 17))


@dataclass(frozen=True)
class Layout:
    """How the work is spread: sizes of the mesh, order of passes, and what never changes the curve."""

    data: int = 1
    pipeline: int = 1
    tensor: int = 1
    schedule: str = "1f1b"
    virtual: int = 1
    sequence: bool = False
    shards: bool = False
    overlaps: bool = False
    recompute: str = "none"
    every: int = 1
    packing: str = "none"

    @property
    def world(self) -> int:
        return self.data * self.pipeline * self.tensor


@dataclass(frozen=True)
class Recipe:
    """All that decides the curve of a run, and so everything but the layout.

    The rate falls from ``rate`` to ``final_rate`` on a line.
    """

    shape: ModelShape = ODD_SHAPE
    dtype: torch.dtype = torch.float64
    seed: int = 11
    num_steps: int = 3
    rate: float = 1e-4
    final_rate: float = 1e-4
    clip_norm: float = 0.0


def with_dropout(shape: ModelShape, probability: float = 0.1) -> ModelShape:
    return replace(shape, hidden_dropout_prob=probability, attention_probs_dropout_prob=probability)


def make_batch(
    lengths: Sequence[int], *, shape: ModelShape, first_sample: int, seed: int, has_labels: bool = True
) -> Batch:
    """Rows ``[CLS] A [SEP] B [SEP]`` of the given lengths, a third of the inner tokens masked."""
    generator = np.random.default_rng((seed, first_sample))
    width, num_rows = max(lengths), len(lengths)
    ids = generator.integers(5, shape.vocab_size, (num_rows, width))
    types = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        middle = length // 2
        ids[row, [0, middle, length - 1]] = [2, 3, 3]
        ids[row, length:] = shape.pad_token_id
        types[row, middle + 1 : length] = 1
    # The last word of the vocabulary lies beside the padding rows; and a [PAD] that is attended to, since those
    # at the end of a row influence nothing and so would hide a gradient that its lookup must not get.
    ids[0, 1], ids[0, 3] = shape.vocab_size - 1, shape.pad_token_id
    inner = (ids >= 5) & (np.arange(width) > 0)
    positions = np.flatnonzero(inner & (generator.random(ids.shape) < 0.33)) if has_labels else np.array([], int)
    num_padded = -(-max(1, len(positions)) // 8) * 8
    masked, labels = np.zeros(num_padded, int), np.full(num_padded, IGNORED)
    masked[: len(positions)], labels[: len(positions)] = positions, ids.reshape(-1)[positions]
    ids.reshape(-1)[positions] = 4
    is_padded = min(lengths) < width
    return Batch(
        input_ids=torch.from_numpy(ids),
        token_type_ids=torch.from_numpy(types),
        attention_mask=torch.arange(width) < torch.tensor(lengths)[:, None] if is_padded else None,
        sample_numbers=tuple(range(first_sample, first_sample + num_rows)),
        masked_positions=torch.from_numpy(masked),
        masked_labels=torch.from_numpy(labels),
        next_sentence_labels=torch.from_numpy(generator.integers(0, 2, num_rows)),
        num_tokens=sum(lengths),
    )


def batches_of_step(step: int, *, shape: ModelShape, seed: int = 5) -> list[Batch]:
    """The four microbatches of a step; in step 1 one of them has no masked token."""
    return [
        make_batch(
            lengths,
            shape=shape,
            first_sample=100 * step + 10 * index,
            seed=seed,
            has_labels=(step, index) != (1, 2),
        )
        for index, lengths in enumerate(LENGTHS)
    ]


def build_mesh(layout: Layout) -> ParallelMesh:
    """The mesh of this rank process."""
    ends = placement_of(layout.schedule, layout.pipeline, layout.virtual).ends
    shape = MeshShape.of_world(
        dist.get_world_size(), tensor=layout.tensor, pipeline=layout.pipeline, ends=ends
    )
    assert shape.data == layout.data
    return ParallelMesh.build(shape, rank=dist.get_rank(), timeout=TIMEOUT)


def load_whole_(stage: MegatronBertStage, tensors: Mapping[str, Tensor]) -> None:
    """Fill a stage from whole tensors by name."""

    def read(name: str, offsets: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        return tensors[name][tuple(slice(o, o + e) for o, e in zip(offsets, extent, strict=True))]

    load_parts_(stage.parts(), read)


def build_stage(
    recipe: Recipe, mesh: ParallelMesh, weights: Mapping[str, Tensor] | None = None
) -> MegatronBertStage:
    """This rank's stage, from the seed or from whole weights."""
    plan = partition(recipe.shape.num_hidden_layers, mesh.pipeline.size)[mesh.pipeline.rank]
    stage = MegatronBertStage(recipe.shape, plan, axis=mesh.tensor, seed=recipe.seed, dtype=recipe.dtype)
    if weights is None:
        initialise_(stage, seed=recipe.seed)
    else:
        load_whole_(stage, weights)
    return stage


def build_gradients(
    stage: MegatronBertStage,
    mesh: ParallelMesh,
    names: Sequence[str],
    *,
    bucket_bytes: int = 8192,
    shards: bool = False,
) -> Gradients:
    owners = mesh.data if shards else Axis.alone("data")
    reduction = Reduction(mesh=mesh, owners=owners, bucket_bytes=bucket_bytes)
    return Gradients(Chunks([stage]).trained_parts(), names, tied=stage.tied(), reduction=reduction)


def run_passes(
    stage: MegatronBertStage, mesh: ParallelMesh, batches: Sequence[Batch], counts: Counts, schedule: str
) -> list[Tensor]:
    """Statistics per microbatch (last stage); gradients add up in the parameters."""

    def criterion(output, batch):
        num_classes = stage.shape.vocab_size
        return microbatch_loss(output, batch, counts, num_classes=num_classes, tensor=mesh.tensor)

    return build_executor(stage, criterion, mesh).run(program_of(schedule, mesh, len(batches)), batches)


def build_executor(stage: MegatronBertStage, criterion: Criterion[Any], mesh: ParallelMesh) -> Executor[Any]:
    placement = straight(mesh.pipeline.size)
    return Executor(
        [stage], criterion, placement=placement, axis=mesh.pipeline, channels=mesh.channels, device=CPU
    )


def program_of(schedule: str, mesh: ParallelMesh, num_microbatches: int) -> Program:
    return programs(schedule, straight(mesh.pipeline.size), num_microbatches)[mesh.pipeline.rank]


def predict(
    recipe: Recipe, layout: Layout, weights: Mapping[str, Tensor] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Logits of the microbatches of step 0 on this rank: masked (its rows of the vocabulary), next sentence."""
    mesh = build_mesh(layout)
    stage = build_stage(recipe, mesh, weights).eval()
    batches = batches_of_step(0, shape=recipe.shape)
    logits: list[tuple[Tensor, Tensor]] = []

    def keep(output, _batch):
        logits.append((output.masked.clone(), output.next_sentence.clone()))
        return output.next_sentence.sum(), torch.zeros(4)

    build_executor(stage, keep, mesh).run(program_of("forward_only", mesh, len(batches)), batches)
    return logits
