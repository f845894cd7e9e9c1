"""Rules over the settings of `optimizer`: lengths that fit, and no setting that would be ignored."""

from collections.abc import Callable
from dataclasses import MISSING, fields

from megatron_bert_tp.config.problems import listed
from megatron_bert_tp.config.rule import WORLD_SIZE, Broken, Rule, near
from megatron_bert_tp.config.schema import LossScaleConfig, OptimizerConfig

_UNITS = ("steps", "samples")
_DECAYING = ("linear", "cosine", "wsd")
_READ_BY = {
    "beta1": ("adamw", "lamb"),
    "beta2": ("adamw", "lamb"),
    "epsilon": ("adamw", "lamb"),
    "momentum": ("sgd",),
}


def _default(kind: type, name: str) -> object:
    (default,) = (field.default for field in fields(kind) if field.name == name)
    assert default is not MISSING, f"{name} has no default"
    return default


def _leave_out(rule: str, name: str, *, unless: str) -> Broken:
    return Broken(rule, f"leave {name} out, or set {unless}")


def _is_read(name: str) -> Rule:
    """The rule that a constant of some update rules is not given for another."""

    def check(value: object, rule: str) -> Broken | None:
        if rule in _READ_BY[name] or value == _default(OptimizerConfig, name):
            return None
        readers = listed(_READ_BY[name])
        return _leave_out(
            f"is read by {readers} alone, and optimizer.name is {rule}",
            f"optimizer.{name}",
            unless=f"optimizer.name: {readers}",
        )

    return Rule((f"optimizer.{name}", "optimizer.name"), check)


def _is_of_unit(name: str, unit: str) -> Rule:
    """The rule that a length is not given in what the schedule does not count."""
    (other,) = set(_UNITS) - {unit}

    def check(value: object, chosen: str) -> Broken | None:
        if chosen == unit or value == _default(OptimizerConfig, f"{name}_{unit}"):
            return None
        return Broken(
            f"counts {unit}, and optimizer.schedule_unit is {chosen}",
            f"use optimizer.{name}_{other}, or set optimizer.schedule_unit: {unit}",
        )

    return Rule((f"optimizer.{name}_{unit}", "optimizer.schedule_unit"), check)


def _is_scaled(name: str) -> Rule:
    """The rule that numbers of the loss scale are given for float16 alone."""

    def check(value: object, precision: str) -> Broken | None:
        if precision == "float16" or value == _default(LossScaleConfig, name):
            return None
        return _leave_out(
            f"is read for float16 alone, and optimizer.precision is {precision}",
            f"optimizer.loss_scale.{name}",
            unless="optimizer.precision: float16",
        )

    return Rule((f"optimizer.loss_scale.{name}", "optimizer.precision"), check)


def _warmup_ends(warmup: int, steps: int) -> Broken | None:
    if warmup <= steps:
        return None
    return Broken(
        f"must not be above optimizer.steps ({steps})", f"use at most {steps}, for example {steps // 10}"
    )


def _warmup_fits_samples(warmup: int, steps: int, batch: int) -> Broken | None:
    most = steps * batch
    if warmup <= most:
        return None
    return Broken(
        f"must not be above the samples of the run, optimizer.steps ({steps}) x optimizer.global_batch ({batch})",
        f"use at most {most}, for example {most // 10}",
    )


def _rate_decays(final: float, highest: float) -> Broken | None:
    if final <= highest:
        return None
    return Broken(
        f"must not be above optimizer.learning_rate ({highest}): the rate decays to it",
        f"use 0 or at most {highest}",
    )


def _constant_has_no_end(final: float, schedule: str) -> Broken | None:
    if schedule != "constant" or final == 0:
        return None
    return Broken(
        "is never reached with optimizer.schedule = constant",
        "leave optimizer.final_learning_rate out, or choose a schedule that decays: linear, cosine, "
        "inverse_square_root or wsd",
    )


def _decays(unit: str) -> Callable[..., Broken | None]:
    def check(decay: int | None, schedule: str) -> Broken | None:
        if decay is None or schedule in _DECAYING:
            return None
        return _leave_out(
            f"is read by {listed(_DECAYING)} alone, and optimizer.schedule is {schedule}",
            f"optimizer.decay_{unit}",
            unless=f"optimizer.schedule: {listed(_DECAYING)}",
        )

    return check


def _decay_fits_steps(decay: int | None, warmup: int, steps: int) -> Broken | None:
    return _decay_fits(decay, warmup, steps, "optimizer.steps")


def _decay_fits_samples(decay: int | None, warmup: int, steps: int, batch: int) -> Broken | None:
    return _decay_fits(decay, warmup, steps * batch, "optimizer.steps x optimizer.global_batch")


def _decay_fits(decay: int | None, warmup: int, length: int, run: str) -> Broken | None:
    if decay is None or warmup > length or warmup + decay <= length:
        return None
    room = f"use at most {length - warmup}, or " if warmup < length else ""
    return Broken(f"plus the warm-up ({warmup}) must not be above {run} ({length})", f"{room}shorten the warm-up")


def _wsd_has_decay(schedule: str, unit: str, steps: int | None, samples: int | None) -> Broken | None:
    if schedule != "wsd" or {"steps": steps, "samples": samples}[unit] is not None:
        return None
    return Broken(
        f"needs optimizer.decay_{unit}, the length of the decay at the end of the run",
        f"set optimizer.decay_{unit}, for example to a tenth of the run, or choose linear",
    )


def _root_has_warmup(schedule: str, unit: str, steps: int, samples: int) -> Broken | None:
    if schedule != "inverse_square_root" or {"steps": steps, "samples": samples}[unit]:
        return None
    return Broken(
        f"needs optimizer.warmup_{unit} above 0: the rate is learning_rate x sqrt(warm-up / {unit} done)",
        f"set optimizer.warmup_{unit}, for example to a hundredth of the run",
    )


def _ramp_has_an_end(ramp: str, final: float | None) -> Broken | None:
    if (ramp == "constant") == (final is None):
        return None
    if final is None:
        return Broken("needs optimizer.final_weight_decay, where the ramp ends", "set it, or choose constant")
    return Broken(
        f"does not change the weight decay, and optimizer.final_weight_decay is {final}",
        "choose linear or cosine, or leave optimizer.final_weight_decay out",
    )


def _ramp_is_complete(start: int | None, increment: int | None, samples: int | None) -> Broken | None:
    given = [start, increment, samples]
    if None not in given or given == [None] * 3:
        return None
    return Broken(
        "must be given together with increment and samples, or none of the three",
        "set all of optimizer.batch_ramp.start, increment and samples, or leave all out",
    )


def _ramp_arrives(increment: int | None, start: int | None, batch: int) -> Broken | None:
    if increment is None or start is None or start >= batch or (batch - start) % increment == 0:
        return None
    return Broken(
        f"must divide {batch - start} = optimizer.global_batch ({batch}) - optimizer.batch_ramp.start ({start})",
        f"use a divisor of {batch - start}, for example {batch - start}",
    )


def _ramp_starts_below(start: int | None, batch: int) -> Broken | None:
    if start is None or start < batch:
        return None
    return Broken(f"must be below optimizer.global_batch ({batch})", "use a smaller start, or leave the ramp out")


def _sizes_are_whole(
    size: int | None, microbatch: int | None, packing: str, tensor: int, pipeline: int, world: int | None
) -> Broken | None:
    if size is None or packing != "none" or microbatch is None:
        return None
    replica = tensor * pipeline
    # A world size that does not fit is told by its own rule; the microbatch must fit in any case.
    data = world // replica if world and world % replica == 0 else 1
    share = microbatch * data
    if size % share == 0:
        return None
    return Broken(
        f"must be a multiple of {share} = parallel.microbatch ({microbatch}) x data size ({data})",
        f"use {near(size, share)}, or a smaller parallel.microbatch",
    )


def _scale_starts_above(initial: float, minimum: float) -> Broken | None:
    if initial >= minimum:
        return None
    return Broken(
        f"must not be below optimizer.loss_scale.minimum ({minimum})", f"use at least {minimum}, such as 65536"
    )


def _apex_has_rule(fused: str, name: str) -> Broken | None:
    if fused != "apex" or name != "sgd":
        return None
    return Broken("has kernels for adamw and lamb here, and optimizer.name is sgd", "set run.fused: torch")


def _apex_is_single(fused: str, precision: str, device: str) -> Broken | None:
    if fused != "apex" or (precision != "float64" and device != "cpu"):
        return None
    return Broken(
        f"needs a GPU and float32 weights; run.device is {device}, optimizer.precision is {precision}",
        "set run.fused: torch",
    )


def _apex_lamb_is_whole(fused: str, name: str, tensor: int, is_sharded: bool) -> Broken | None:
    if fused != "apex" or name != "lamb" or (tensor == 1 and not is_sharded):
        return None
    return Broken(
        "computes the norms of LAMB from whole tensors: it needs parallel.tensor = 1 and no "
        f"parallel.shard_optimizer; they are {tensor} and {str(is_sharded).lower()}",
        "set run.fused: torch, whose LAMB adds the norms over ranks",
    )


def _apex_lamb_decays(fused: str, name: str, decay: float) -> Broken | None:
    if fused != "apex" or name != "lamb" or decay > 0:
        return None
    return Broken(
        "gives trust ratios only to weights that decay, so its LAMB needs optimizer.weight_decay above 0",
        "set run.fused: torch, or a weight decay",
    )


_LAYOUT = ("parallel.microbatch", "parallel.packing", "parallel.tensor", "parallel.pipeline", WORLD_SIZE)

OPTIMIZER_RULES: tuple[Rule, ...] = (
    *map(_is_read, _READ_BY),
    *(_is_of_unit(name, unit) for name in ("warmup", "decay") for unit in _UNITS),
    *(_is_scaled(field.name) for field in fields(LossScaleConfig)),
    Rule(("optimizer.warmup_steps", "optimizer.steps"), _warmup_ends),
    Rule(("optimizer.warmup_samples", "optimizer.steps", "optimizer.global_batch"), _warmup_fits_samples),
    Rule(("optimizer.final_learning_rate", "optimizer.learning_rate"), _rate_decays),
    Rule(("optimizer.final_learning_rate", "optimizer.schedule"), _constant_has_no_end),
    *(Rule((f"optimizer.decay_{unit}", "optimizer.schedule"), _decays(unit)) for unit in _UNITS),
    Rule(("optimizer.decay_steps", "optimizer.warmup_steps", "optimizer.steps"), _decay_fits_steps),
    Rule(
        ("optimizer.decay_samples", "optimizer.warmup_samples", "optimizer.steps", "optimizer.global_batch"),
        _decay_fits_samples,
    ),
    Rule(
        ("optimizer.schedule", "optimizer.schedule_unit", "optimizer.decay_steps", "optimizer.decay_samples"),
        _wsd_has_decay,
    ),
    Rule(
        ("optimizer.schedule", "optimizer.schedule_unit", "optimizer.warmup_steps", "optimizer.warmup_samples"),
        _root_has_warmup,
    ),
    Rule(("optimizer.weight_decay_ramp", "optimizer.final_weight_decay"), _ramp_has_an_end),
    Rule(
        ("optimizer.batch_ramp.start", "optimizer.batch_ramp.increment", "optimizer.batch_ramp.samples"),
        _ramp_is_complete,
    ),
    Rule(("optimizer.batch_ramp.start", "optimizer.global_batch"), _ramp_starts_below),
    Rule(
        ("optimizer.batch_ramp.increment", "optimizer.batch_ramp.start", "optimizer.global_batch"),
        _ramp_arrives,
    ),
    Rule(("optimizer.batch_ramp.start", *_LAYOUT), _sizes_are_whole),
    Rule(("optimizer.batch_ramp.increment", *_LAYOUT), _sizes_are_whole),
    Rule(("optimizer.loss_scale.initial", "optimizer.loss_scale.minimum"), _scale_starts_above),
    Rule(("run.fused", "optimizer.name"), _apex_has_rule),
    Rule(("run.fused", "optimizer.precision", "run.device"), _apex_is_single),
    Rule(("run.fused", "optimizer.name", "parallel.tensor", "parallel.shard_optimizer"), _apex_lamb_is_whole),
    Rule(("run.fused", "optimizer.name", "optimizer.weight_decay"), _apex_lamb_decays),
)
