"""Rules over those settings of `optimizer` that pretraining and tasks share."""

from dataclasses import MISSING, fields

from megatron_bert_tp.config.problems import listed
from megatron_bert_tp.config.rule import Broken, Rule
from megatron_bert_tp.config.schema import LossScaleConfig, UpdateConfig

_READ_BY = {
    "beta1": ("adamw", "lamb"),
    "beta2": ("adamw", "lamb"),
    "epsilon": ("adamw", "lamb"),
    "momentum": ("sgd",),
}


def default_of(kind: type, name: str) -> object:
    """Default of the field ``name`` of a section."""
    (default,) = (field.default for field in fields(kind) if field.name == name)
    assert default is not MISSING, f"{name} has no default"
    return default


def is_read(path: str, *, name: str, precision: str) -> bool:
    """Whether the update rule ``name`` reads the setting ``path`` where the number format is ``precision``."""
    own = path.removeprefix("optimizer.")
    if own.startswith("loss_scale."):
        return precision == "float16"
    return own not in _READ_BY or name in _READ_BY[own]


def left_out(rule: str, name: str, *, unless: str) -> Broken:
    """What is told of a setting that nothing would read."""
    return Broken(rule, f"leave {name} out, or set {unless}")


def _is_for_rule(name: str) -> Rule:
    """The rule that a constant of some update rules is not given for another."""

    def check(value: object, rule: str) -> Broken | None:
        if rule in _READ_BY[name] or value == default_of(UpdateConfig, name):
            return None
        readers = listed(_READ_BY[name])
        return left_out(
            f"is read by {readers} alone, and optimizer.name is {rule}",
            f"optimizer.{name}",
            unless=f"optimizer.name: {readers}",
        )

    return Rule((f"optimizer.{name}", "optimizer.name"), check)


def _is_scaled(name: str) -> Rule:
    """The rule that numbers of the loss scale are given for float16 alone."""

    def check(value: object, precision: str) -> Broken | None:
        if precision == "float16" or value == default_of(LossScaleConfig, name):
            return None
        return left_out(
            f"is read for float16 alone, and optimizer.precision is {precision}",
            f"optimizer.loss_scale.{name}",
            unless="optimizer.precision: float16",
        )

    return Rule((f"optimizer.loss_scale.{name}", "optimizer.precision"), check)


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
        "leave optimizer.final_learning_rate out, or choose a schedule that decays, such as linear or cosine",
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


UPDATE_RULES: tuple[Rule, ...] = (
    *map(_is_for_rule, _READ_BY),
    *(_is_scaled(field.name) for field in fields(LossScaleConfig)),
    Rule(("optimizer.final_learning_rate", "optimizer.learning_rate"), _rate_decays),
    Rule(("optimizer.final_learning_rate", "optimizer.schedule"), _constant_has_no_end),
    Rule(("optimizer.loss_scale.initial", "optimizer.loss_scale.minimum"), _scale_starts_above),
    Rule(("run.fused", "optimizer.name"), _apex_has_rule),
    Rule(("run.fused", "optimizer.precision", "run.device"), _apex_is_single),
    Rule(("run.fused", "optimizer.name", "parallel.tensor", "parallel.shard_optimizer"), _apex_lamb_is_whole),
    Rule(("run.fused", "optimizer.name", "optimizer.weight_decay"), _apex_lamb_decays),
)
