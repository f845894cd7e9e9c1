"""From a recipe to a trainer: stages, optimizer and gradients of one rank."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.data.loader import Loading, StepLoader
from megatron_bert_tp.model.chunks import Chunks
from megatron_bert_tp.model.recompute import Recompute
from megatron_bert_tp.model.shape import tensor_shapes
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.objectives.pretraining import PretrainingObjective
from megatron_bert_tp.optim.apex import mixed_layer_norm
from megatron_bert_tp.optim.loss_scale import LossScale
from megatron_bert_tp.optim.rate_factors import rate_factor
from megatron_bert_tp.optim.rules import build_optimizer
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.parallel.collectives import sum_over_
from megatron_bert_tp.parallel.gradients import Gradients, Reduction
from megatron_bert_tp.parallel.mesh import Axis, ParallelMesh
from megatron_bert_tp.parallel.ownership import OwnedWeights
from megatron_bert_tp.parallel.triton_dropout import kernels_for
from megatron_bert_tp.pipeline.placement import Placement
from megatron_bert_tp.reliability.actions import Actions
from megatron_bert_tp.training.anomalies import NormHistory
from megatron_bert_tp.training.failures import together
from megatron_bert_tp.training.numbers import (
    batch_size,
    microbatches_of_steps,
    optimizer_numbers,
    update_numbers,
)
from megatron_bert_tp.training.passes import Passes
from megatron_bert_tp.training.pipeline import Pipeline
from megatron_bert_tp.training.recipe import Recipe, pretraining_recipe
from megatron_bert_tp.training.resume import samples_at_the_end, samples_done
from megatron_bert_tp.training.state import (
    fill_masters_,
    load_moments_,
    loss_scale_of,
    updates_of,
    weights_source,
)
from megatron_bert_tp.training.texts import Texts
from megatron_bert_tp.training.trainer import Objective, Pace, Trainer
from megatron_bert_tp.training.update import Updater

Take = Callable[[int], Sequence[Any]]
"""From the samples done to this replica's microbatches of the step that follows them."""


def build_pretrainer(
    config: Config,
    mesh: ParallelMesh,
    texts: Texts,
    *,
    agreement: Agreement,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
    actions: Actions | None = None,
) -> Trainer:
    """Trainer of pretraining over ``texts``."""
    objective = PretrainingObjective(config.model.vocab_size, mesh.tensor)
    return build_trainer(
        pretraining_recipe(config),
        mesh,
        objective,
        texts.training.take,
        agreement=agreement,
        device=device,
        checkpoint=checkpoint,
        actions=actions,
    )


def build_trainer(
    recipe: Recipe,
    mesh: ParallelMesh,
    objective: Objective,
    take: Take,
    *,
    agreement: Agreement,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
    actions: Actions | None = None,
) -> Trainer:
    """Stages, optimizer and gradients of one rank, new, from given weights, or as a checkpoint left them.

    ``actions`` is told what this rank does while it trains.
    """
    pipeline = build_pipeline(recipe, mesh, device=device, actions=actions)
    pipeline.passes.check_batches(microbatches_of_steps(recipe, mesh.data.size))
    chunks = pipeline.chunks
    chunks.freeze_(recipe.frozen_layers)
    with together(agreement):
        fill = weights_source(recipe, checkpoint, checks=mesh.is_first)
        fill((part, part.view(part.parameter)) for part in chunks.parts())
        updater = _updater(recipe, pipeline, checkpoint=checkpoint)
        fill_masters_(chunks, updater, fill)
        if checkpoint is not None:
            load_moments_(updater, recipe.optimizer.name, checkpoint)
    steps, samples = (checkpoint.step, samples_done(checkpoint)) if checkpoint else (0, 0)
    end = samples_at_the_end(recipe.optimizer, steps_done=steps, samples_done=samples)
    return Trainer(
        pipeline,
        updater,
        objective,
        _steps(recipe, take, device, end=end),
        agreement=agreement,
        pace=Pace(
            steps=recipe.optimizer.steps,
            batch=batch_size(recipe.optimizer),
            save_every=recipe.run.save_every,
            warmup_setting=recipe.warmup_setting,
        ),
        steps_done=steps,
        samples_done=samples,
    )


def build_pipeline(
    recipe: Recipe, mesh: ParallelMesh, *, device: torch.device, actions: Actions | None = None
) -> Pipeline:
    """The stages of this rank, without weights as yet, and the programs that run them."""
    passes = Passes(recipe.parallel)
    return Pipeline(
        chunks=_chunks(recipe, mesh, passes.placement, device),
        passes=passes,
        mesh=mesh,
        device=device,
        actions=actions or Actions.silent(),
    )


def _chunks(recipe: Recipe, mesh: ParallelMesh, placement: Placement, device: torch.device) -> Chunks:
    """The empty stages of this rank."""
    parallel = recipe.parallel
    dtype = getattr(torch, recipe.optimizer.precision)
    with device:  # made there: moving a stage would part the two leaves of a tied weight
        chunks = Chunks(
            [
                MegatronBertStage(
                    recipe.shape,
                    recipe.plans[stage],
                    axis=mesh.tensor,
                    head=recipe.head,
                    seed=recipe.optimizer.seed,
                    dtype=dtype,
                    kernels=kernels_for(device, dtype),
                    splits_sequence=parallel.sequence,
                    recompute=Recompute(parallel.recompute, parallel.recompute_every),
                )
                for stage in placement.stages[mesh.pipeline.rank]
            ]
        )
        if recipe.run.fused == "apex":
            chunks.use_norm_(mixed_layer_norm())
    return chunks


def _updater(recipe: Recipe, pipeline: Pipeline, *, checkpoint: Checkpoint | None) -> Updater:
    parallel, mesh, chunks = recipe.parallel, pipeline.mesh, pipeline.chunks
    reduction = Reduction(
        mesh=mesh,
        owners=mesh.data if parallel.shard_optimizer else Axis.alone("data"),
        splits_sequence=parallel.sequence and mesh.tensor.size > 1,
        bucket_bytes=parallel.bucket_megabytes << 20,
    )
    names = list(tensor_shapes(recipe.shape, recipe.head))
    gradients = Gradients(
        chunks.trained_parts(), names, tied=chunks.tied(), reduction=reduction, device=pipeline.device
    )
    for stage in chunks:
        stage.weight_gradients.deliver = gradients.accumulate
    weights = OwnedWeights(gradients, reduction.owners)

    def sum_over_owners(vector: Tensor) -> Tensor:
        return sum_over_(sum_over_(vector, mesh.tensor), reduction.owners)

    numbers = update_numbers(recipe.optimizer, recipe.run.anomalies)
    scale = None if checkpoint is None else loss_scale_of(checkpoint)
    if scale is None and numbers.loss_scale is not None:
        scale = LossScale.begin(numbers.loss_scale)
    return Updater(
        gradients,
        weights,
        build_optimizer(
            weights.owned,
            optimizer_numbers(recipe.optimizer),
            sum_over_owners=sum_over_owners,
            factor=rate_factor(recipe.shape.num_hidden_layers, recipe.layer_decay),
            fused=recipe.run.fused,
        ),
        numbers,
        updates_done=0 if checkpoint is None else updates_of(checkpoint),
        loss_scale=scale if numbers.loss_scale is not None else None,
        history=None if checkpoint is None else NormHistory.from_facts(checkpoint.facts),
        actions=pipeline.actions,
    )


def _steps(recipe: Recipe, take: Take, device: torch.device, *, end: int) -> StepLoader[Any]:
    loading = Loading(
        num_workers=recipe.run.data_workers,
        pins_memory=device.type == "cuda",
        timeout_seconds=recipe.run.timeout_seconds,
    )
    size_of = batch_size(recipe.optimizer).global_batch_at
    return StepLoader(take, size_of=size_of, end=end, loading=loading)
