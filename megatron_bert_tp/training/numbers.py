"""From the settings of the optimizer to the numbers of a step: its size, rate, decay and loss scale."""

from megatron_bert_tp.config.schema import AnomaliesConfig, OptimizerConfig
from megatron_bert_tp.optim.batch_size import BatchRamp, BatchSize
from megatron_bert_tp.optim.learning_rate import Schedule, schedule_of
from megatron_bert_tp.optim.loss_scale import LossScaleNumbers
from megatron_bert_tp.optim.rules import OptimizerNumbers
from megatron_bert_tp.optim.weight_decay import WeightDecay
from megatron_bert_tp.training.anomalies import AnomalyNumbers
from megatron_bert_tp.training.recipe import Recipe
from megatron_bert_tp.training.update import UpdateNumbers


def batch_size(optimizer: OptimizerConfig) -> BatchSize:
    """Samples of each step."""
    ramp = optimizer.batch_ramp
    if ramp.start is None or ramp.increment is None or ramp.samples is None:
        return BatchSize(optimizer.global_batch)
    return BatchSize(optimizer.global_batch, BatchRamp(ramp.start, ramp.increment, ramp.samples))


def microbatches_of_steps(recipe: Recipe, data_size: int) -> tuple[int, ...] | None:
    """How many microbatches of a replica the steps of the run may have; None where the samples decide."""
    optimizer = recipe.optimizer
    microbatch, full, ramp = recipe.parallel.microbatch, optimizer.global_batch, optimizer.batch_ramp
    if recipe.parallel.packing != "none" or microbatch is None:
        return None
    smaller = () if ramp.start is None or ramp.increment is None else range(ramp.start, full, ramp.increment)
    return tuple(size // (microbatch * data_size) for size in (*smaller, full))


def optimizer_numbers(optimizer: OptimizerConfig) -> OptimizerNumbers:
    """Constants of the update rule."""
    return OptimizerNumbers(
        name=optimizer.name,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        epsilon=optimizer.epsilon,
        momentum=optimizer.momentum,
        weight_decay=optimizer.weight_decay,
    )


def update_numbers(optimizer: OptimizerConfig, anomalies: AnomaliesConfig) -> UpdateNumbers:
    """How large a step may be, and when its numbers are wrong."""
    first, final = optimizer.weight_decay, optimizer.final_weight_decay
    return UpdateNumbers(
        clip_norm=optimizer.clip_norm,
        rates=_rates(optimizer),
        decay=WeightDecay(
            optimizer.weight_decay_ramp, first, first if final is None else final, _length(optimizer)
        ),
        counts_samples=optimizer.schedule_unit == "samples",
        loss_scale=_loss_scale(optimizer) if optimizer.precision == "float16" else None,
        anomalies=AnomalyNumbers(
            not_finite=anomalies.not_finite,
            spike=anomalies.spike,
            spike_factor=anomalies.spike_factor,
            spike_window=anomalies.spike_window,
            most_skips=anomalies.most_skips,
        ),
    )


def _rates(optimizer: OptimizerConfig) -> Schedule:
    is_by_samples = optimizer.schedule_unit == "samples"
    return schedule_of(
        optimizer.schedule,
        peak=optimizer.learning_rate,
        final=optimizer.final_learning_rate,
        warmup=optimizer.warmup_samples if is_by_samples else optimizer.warmup_steps,
        length=_length(optimizer),
        decay=optimizer.decay_samples if is_by_samples else optimizer.decay_steps,
    )


def _length(optimizer: OptimizerConfig) -> int:
    """Steps or samples of the whole run."""
    if optimizer.schedule_unit == "steps":
        return optimizer.steps
    return batch_size(optimizer).samples_after(optimizer.steps)


def _loss_scale(optimizer: OptimizerConfig) -> LossScaleNumbers:
    given = optimizer.loss_scale
    return LossScaleNumbers(
        initial=given.initial,
        growth_interval=given.growth_interval,
        hysteresis=given.hysteresis,
        minimum=given.minimum,
        most_skips=given.most_skips,
    )
