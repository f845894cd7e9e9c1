"""From settings to a trainer: the one place, beside the entry points, that sees the whole `Config`."""

from dataclasses import fields

import torch
from torch import Tensor

from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.config.schema import Config, ModelConfig
from megatron_bert_tp.data.loader import Loading, StepLoader
from megatron_bert_tp.model.chunks import Chunks
from megatron_bert_tp.model.recompute import Recompute
from megatron_bert_tp.model.shape import ModelShape, tensor_shapes
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.optim.apex import mixed_layer_norm
from megatron_bert_tp.optim.loss_scale import LossScale
from megatron_bert_tp.optim.rules import build_optimizer
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.parallel.collectives import sum_over_
from megatron_bert_tp.parallel.gradients import Gradients, Reduction
from megatron_bert_tp.parallel.mesh import Axis, ParallelMesh
from megatron_bert_tp.parallel.ownership import OwnedWeights
from megatron_bert_tp.parallel.triton_dropout import kernels_for
from megatron_bert_tp.pipeline.partition import StagePlan, partition, stage_costs
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
from megatron_bert_tp.training.resume import samples_at_the_end, samples_done
from megatron_bert_tp.training.state import (
    fill_masters_,
    load_moments_,
    loss_scale_of,
    updates_of,
    weights_source,
)
from megatron_bert_tp.training.texts import Texts
from megatron_bert_tp.training.trainer import Pace, Trainer
from megatron_bert_tp.training.update import Updater


def build_trainer(
    config: Config,
    mesh: ParallelMesh,
    texts: Texts,
    *,
    agreement: Agreement,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
    actions: Actions | None = None,
) -> Trainer:
    """Stages, optimizer and gradients of one rank, new, from given weights, or as a checkpoint left them.

    ``actions`` is told what this rank does while it trains.
    """
    passes = Passes(config.parallel)
    passes.check_batches(microbatches_of_steps(config, mesh.data.size))
    chunks = _chunks(config, mesh, passes.placement, device)
    with together(agreement):
        fill = weights_source(config, chunks.shape, checkpoint, checks=mesh.is_first)
        fill((part, part.view(part.parameter)) for part in chunks.parts())
        updater = _updater(config, mesh, chunks, checkpoint=checkpoint, actions=actions)
        fill_masters_(updater, fill)
        if checkpoint is not None:
            load_moments_(updater, config.optimizer.name, checkpoint)
    steps, samples = (checkpoint.step, samples_done(checkpoint)) if checkpoint else (0, 0)
    end = samples_at_the_end(config, steps_done=steps, samples_done=samples)
    return Trainer(
        chunks,
        updater,
        texts,
        _steps(config, texts, device, end=end),
        mesh=mesh,
        agreement=agreement,
        passes=passes,
        device=device,
        pace=_pace(config),
        steps_done=steps,
        samples_done=samples,
        actions=actions,
    )


def _chunks(config: Config, mesh: ParallelMesh, placement: Placement, device: torch.device) -> Chunks:
    """The empty stages of this rank."""
    shape, plans, parallel = model_shape(config), stage_plans(config), config.parallel
    dtype = getattr(torch, config.optimizer.precision)
    with device:  # made there: moving a stage would part the two leaves of a tied weight
        chunks = Chunks(
            [
                MegatronBertStage(
                    shape,
                    plans[stage],
                    axis=mesh.tensor,
                    seed=config.optimizer.seed,
                    dtype=dtype,
                    kernels=kernels_for(device, dtype),
                    splits_sequence=parallel.sequence,
                    recompute=Recompute(parallel.recompute, parallel.recompute_every),
                )
                for stage in placement.stages[mesh.pipeline.rank]
            ]
        )
        if config.run.fused == "apex":
            chunks.use_norm_(mixed_layer_norm())
    return chunks


def _updater(
    config: Config, mesh: ParallelMesh, chunks: Chunks, *, checkpoint: Checkpoint | None, actions: Actions | None
) -> Updater:
    parallel = config.parallel
    reduction = Reduction(
        mesh=mesh,
        owners=mesh.data if parallel.shard_optimizer else Axis.alone("data"),
        splits_sequence=parallel.sequence and mesh.tensor.size > 1,
        bucket_bytes=parallel.bucket_megabytes << 20,
    )
    names = list(tensor_shapes(chunks.shape))
    gradients = Gradients(chunks.trained_parts(), names, tied=chunks.tied(), reduction=reduction)
    for stage in chunks:
        stage.weight_gradients.deliver = gradients.accumulate
    weights = OwnedWeights(gradients, reduction.owners)

    def sum_over_owners(vector: Tensor) -> Tensor:
        return sum_over_(sum_over_(vector, mesh.tensor), reduction.owners)

    numbers = update_numbers(config.optimizer, config.run.anomalies)
    scale = None if checkpoint is None else loss_scale_of(checkpoint)
    if scale is None and numbers.loss_scale is not None:
        scale = LossScale.begin(numbers.loss_scale)
    return Updater(
        gradients,
        weights,
        build_optimizer(
            weights.owned,
            optimizer_numbers(config.optimizer),
            sum_over_owners=sum_over_owners,
            fused=config.run.fused,
        ),
        numbers,
        updates_done=0 if checkpoint is None else updates_of(checkpoint),
        loss_scale=scale if numbers.loss_scale is not None else None,
        history=None if checkpoint is None else NormHistory.from_facts(checkpoint.facts),
        actions=actions,
    )


def _steps(config: Config, texts: Texts, device: torch.device, *, end: int) -> StepLoader:
    loading = Loading(
        num_workers=config.run.data_workers,
        pins_memory=device.type == "cuda",
        timeout_seconds=config.run.timeout_seconds,
    )
    size_of = batch_size(config.optimizer).global_batch_at
    return StepLoader(texts.training.take, size_of=size_of, end=end, loading=loading)


def model_shape(config: Config) -> ModelShape:
    """The sizes of the model among the settings."""
    settable = {field.name for field in fields(ModelConfig)}
    names = [field.name for field in fields(ModelShape) if field.name in settable]
    return ModelShape(**{name: getattr(config.model, name) for name in names})


def stage_plans(config: Config) -> tuple[StagePlan, ...]:
    """Which layers each (virtual) stage holds, the weight of the MLM head at the masked positions considered."""
    model = config.model
    costs = stage_costs(
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        vocab_size=model.vocab_size,
        sequence_length=config.data.sequence_length,
        predicted_share=config.objective.masking.probability,
    )
    return partition(
        model.num_hidden_layers,
        config.parallel.pipeline * config.parallel.virtual,
        embedding_cost=costs.embedding,
        head_cost=costs.head,
    )


def _pace(config: Config) -> Pace:
    return Pace(
        steps=config.optimizer.steps,
        batch=batch_size(config.optimizer),
        save_every=config.run.save_every,
        evaluate_every=config.run.evaluate_every,
        evaluation_samples=config.run.evaluation_samples,
    )
