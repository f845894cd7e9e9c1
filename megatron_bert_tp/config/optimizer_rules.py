"""Rules over `optimizer` in pretraining: lengths that fit, and no setting that would be ignored."""

from collections.abc import Callable

from megatron_bert_tp.config.problems import listed
from megatron_bert_tp.config.rule import WORLD_SIZE, Broken, Rule, near
from megatron_bert_tp.config.schema import OptimizerConfig
from megatron_bert_tp.config.update_rules import UPDATE_RULES, default_of, left_out

_UNITS = ("steps", "samples")
_DECAYING = ("linear", "cosine", "wsd")


def _is_of_unit(name: str, unit: str) -> Rule:
    """The rule that a length is not given in what the schedule does not count."""
    (other,) = set(_UNITS) - {unit}

    def check(value: object, chosen: str) -> Broken | None:
        if chosen == unit or value == default_of(OptimizerConfig, f"{name}_{unit}"):
            return None
        return Broken(
            f"counts {unit}, and optimizer.schedule_unit is {chosen}",
            f"use optimizer.{name}_{other}, or set optimizer.schedule_unit: {unit}",
        )

    return Rule((f"optimizer.{name}_{unit}", "optimizer.schedule_unit"), check)


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


def _decays(unit: str) -> Callable[..., Broken | None]:
    def check(decay: int | None, schedule: str) -> Broken | None:
        if decay is None or schedule in _DECAYING:
            return None
        return left_out(
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


_LAYOUT = ("parallel.microbatch", "parallel.packing", "parallel.tensor", "parallel.pipeline", WORLD_SIZE)

OPTIMIZER_RULES: tuple[Rule, ...] = (
    *UPDATE_RULES,
    *(_is_of_unit(name, unit) for name in ("warmup", "decay") for unit in _UNITS),
    Rule(("optimizer.warmup_steps", "optimizer.steps"), _warmup_ends),
    Rule(("optimizer.warmup_samples", "optimizer.steps", "optimizer.global_batch"), _warmup_fits_samples),
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
)
