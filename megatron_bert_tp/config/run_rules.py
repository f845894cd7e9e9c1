"""Rules of the settings of `run`."""

from megatron_bert_tp.config.duration import seconds_of
from megatron_bert_tp.config.rule import Broken, Rule


def _stops_in_time(stop_after: str | None) -> Broken | None:
    if stop_after is None or seconds_of(stop_after) is not None:
        return None
    return Broken(
        "must be a time above 0 in days, hours, minutes and seconds, in this order",
        "write it like 3h50m, 45m, 90s or 1d12h",
    )


def _messages_outlast_silence(step_timeout: float | None, timeout: float) -> Broken | None:
    if step_timeout is None or step_timeout <= timeout:
        return None
    return Broken(
        f"must not be above run.timeout_seconds ({timeout:g}), after which a message fails anyway",
        f"use at most {timeout:g}, or raise run.timeout_seconds to {step_timeout:g}",
    )


RUN_RULES: tuple[Rule, ...] = (
    Rule(("run.stop_after",), _stops_in_time),
    Rule(("run.step_timeout_seconds", "run.timeout_seconds"), _messages_outlast_silence),
)
