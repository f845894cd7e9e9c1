"""What a model gives for all samples of a table, computed by all ranks and put in the order of the samples."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_bert_tp.data.draws import Ints
from megatron_bert_tp.parallel.collectives import gather_over, sum_over_
from megatron_bert_tp.tasks.batches import TaskBatch, TaskBatches
from megatron_bert_tp.tasks.feature_table import FeatureTable, bounds_of
from megatron_bert_tp.tasks.task import Kind
from megatron_bert_tp.training.pipeline import Pipeline
from megatron_bert_tp.training.trainer import Objective, StepLosses

Floats = npt.NDArray[np.floating[Any]]
_BY_TOKEN = (Kind.ANSWER, Kind.TAGS)


def outputs_of(
    pipeline: Pipeline, table: FeatureTable, batches: TaskBatches, objective: Objective
) -> tuple[Floats, StepLosses | None]:
    """Logits of every sample exactly once, without dropout, and the loss where the table has labels.

    Every rank calls it and gets all: ``[samples, outputs]``, for choices ``[samples x choices, 1]``, and for
    answers and tags ``[tokens, outputs]``; float32, or float64 where the model computes in that.  Messages: the
    logits over the data axis, and then over the pipeline.
    """
    mine = [batch.to(pipeline.device) for batch in batches.evaluation()]
    is_measured = table.labels is not None
    counts = objective.count(mine, pipeline.mesh.data, pipeline.device) if is_measured else None
    sums = torch.zeros(objective.num_statistics, dtype=torch.float64, device=pipeline.device)

    def criterion(logits: Tensor, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        if is_measured:
            sums.add_(objective.share(logits, batch, counts)[1])
        return logits.new_zeros(()), _items(logits, batch, table.kind)

    items = pipeline.measure(mine, criterion)
    sum_over_(sum_over_(sums, pipeline.mesh.data), pipeline.mesh.pipeline)
    losses = objective.losses(sums, counts) if is_measured else None
    return _in_order(items, pipeline, table, batches), losses


def items_per_sample(table: FeatureTable) -> Ints:
    """``[samples]`` rows of outputs that belong to each sample."""
    if table.kind in _BY_TOKEN:
        lengths: Ints = table.lengths.sum(axis=1)
        return lengths
    return np.full(table.num_samples, table.rows_per_sample)


def put_in_order(parts: Sequence[Floats], samples: Sequence[Ints], num_items: Ints) -> Floats:
    """Rows ``[items, outputs]`` in the order of the samples.

    Part p has the rows of ``samples[p]``, one sample behind another; ``num_items`` ``[samples]`` says how many
    each has.
    """
    firsts = bounds_of(num_items)
    ordered = np.empty((int(firsts[-1]), parts[0].shape[1]), dtype=parts[0].dtype)
    for rows, numbers in zip(parts, samples, strict=True):
        counts = num_items[numbers]
        own = bounds_of(counts)
        places = np.arange(int(own[-1])) + np.repeat(firsts[numbers] - own[:-1], counts)
        ordered[places] = rows[: len(places)]
    return ordered


def _items(logits: Tensor, batch: TaskBatch, kind: Kind) -> Tensor:
    """``[items, outputs]`` of the real samples, or tokens, of a microbatch."""
    if not batch.num_tokens:
        return logits.new_zeros(0, logits.shape[-1])
    if kind not in _BY_TOKEN:
        return logits
    if batch.attention_mask is not None:
        return logits[batch.attention_mask]
    return logits.flatten(0, 1)[: batch.num_tokens]


def _in_order(
    items: Sequence[Tensor], pipeline: Pipeline, table: FeatureTable, batches: TaskBatches
) -> Floats:
    """The items of the last stage on all ranks, in the order of the samples."""
    mesh, num_items = pipeline.mesh, items_per_sample(table)
    samples = [_joined(batches.evaluation_samples(rank)) for rank in range(mesh.data.size)]
    longest = max(int(num_items[numbers].sum()) for numbers in samples)
    width = pipeline.num_outputs
    dtype = torch.promote_types(pipeline.chunks[0].dtype, torch.float32)
    own = torch.zeros(longest, width, dtype=dtype, device=pipeline.device)
    if items:
        rows = torch.cat(list(items))
        own[: len(rows)] = rows
    everything = sum_over_(gather_over(own, mesh.data, dim=0), mesh.pipeline)
    parts = everything.cpu().numpy().reshape(mesh.data.size, longest, width)
    return put_in_order(list(parts), samples, num_items)


def _joined(microbatches: Sequence[Ints]) -> Ints:
    return np.concatenate(microbatches) if microbatches else np.zeros(0, dtype=np.int64)
