"""Steps whose numbers are wrong: what becomes of them, and how they are told.

A norm is compared with the median of the latest ones.  All ranks have the same loss and the same norm, so all of
them decide alike without a message.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from statistics import median
from typing import Literal

from megatron_bert_tp.errors import CheckpointError

NORMS, SKIPPED = "norms", "skipped_in_a_row"
"""Facts of a checkpoint: what the next step is judged by."""
_MOST_NORMS = 10_000  # the upper bound of run.anomalies.spike_window
_MOST_TOLD = 8  # samples or tensors in a message
_MOST_RECORDED = 100  # tensors in a record


@dataclass(frozen=True, kw_only=True)
class AnomalyNumbers:
    """The settings ``run.anomalies``."""

    not_finite: Literal["stop", "skip"] = "stop"
    spike: Literal["report", "skip", "stop"] = "report"
    spike_factor: float | None = 10.0
    spike_window: int = 50
    most_skips: int = 10

    @property
    def fewest_norms(self) -> int:
        """Norms that there must be before one is called a spike: half a window, at least 3.

        Where norms vary by a factor of e^s from step to step, the median of n of them is off by about
        e^(1.25 s / sqrt(n)): by 1.13 for s = 0.5 and the 25 of the default, far below any factor.  Of 3 norms a
        single outlier cannot be the median; of 2 it moves it.
        """
        return -(-self.spike_window // 2)


class Consequence(Enum):
    """What becomes of a step; a step that is reported is taken as any other."""

    REPORTED = "reported"
    SKIPPED = "skipped"
    STOPPED = "stopped"


_CONSEQUENCES = {"report": Consequence.REPORTED, "skip": Consequence.SKIPPED, "stop": Consequence.STOPPED}


@dataclass(frozen=True)
class Anomaly:
    """What is wrong with a step, and what becomes of it."""

    consequence: Consequence
    loss: float
    norm: float
    skipped_in_a_row: int
    """This step included; 0 where it is taken."""
    usual: float | None = None
    """Median of the latest norms, for a spike; else loss or norm are not finite."""

    @property
    def is_spike(self) -> bool:
        """Whether the norm is finite, but much larger than usual."""
        return self.usual is not None


@dataclass(frozen=True)
class NormHistory:
    """What steps are judged by: the latest gradient norms of steps that were taken, and the skips since then."""

    norms: tuple[float, ...] = ()
    skipped_in_a_row: int = 0

    def judge(self, loss: float, norm: float, numbers: AnomalyNumbers) -> Anomaly | None:
        """What is wrong with the coming step, if anything is."""
        usual: float | None = None
        wanted: str = numbers.not_finite
        if math.isfinite(loss) and math.isfinite(norm):
            usual = self._usual(norm, numbers)
            if usual is None:
                return None
            wanted = numbers.spike
        consequence = _CONSEQUENCES[wanted]
        skipped = 0 if consequence is Consequence.REPORTED else self.skipped_in_a_row + 1
        if skipped >= numbers.most_skips:
            consequence = Consequence.STOPPED
        return Anomaly(consequence, loss, norm, skipped, usual)

    def after(self, norm: float, anomaly: Anomaly | None, numbers: AnomalyNumbers) -> "NormHistory":
        """The history of the next step.  Norms of steps that were not taken do not enter it."""
        if anomaly is not None and anomaly.consequence is not Consequence.REPORTED:
            return replace(self, skipped_in_a_row=anomaly.skipped_in_a_row)
        return NormHistory((*self.norms, norm)[-numbers.spike_window :], 0)

    @classmethod
    def from_facts(cls, facts: Mapping[str, object]) -> "NormHistory":
        """History among the facts of a checkpoint, empty where it has none; CheckpointError where it is none."""
        norms, skipped = facts.get(NORMS, []), facts.get(SKIPPED, 0)
        is_whole = isinstance(norms, list) and len(norms) <= _MOST_NORMS and all(map(_is_norm, norms))
        if not isinstance(norms, list) or not is_whole or type(skipped) is not int or skipped < 0:
            raise CheckpointError(
                f"the checkpoint's {NORMS} must be at most {_MOST_NORMS} finite numbers, not {norms!r:.100}, and "
                f"its {SKIPPED} a count, not {skipped!r:.100}; start a new run from its weights, with "
                "model.weights="
            )
        return cls(tuple(norms), skipped)

    def _usual(self, norm: float, numbers: AnomalyNumbers) -> float | None:
        """The median that ``norm`` is so many times above; None where it is no spike."""
        latest = self.norms[-numbers.spike_window :]
        if numbers.spike_factor is None or len(latest) < numbers.fewest_norms:
            return None
        usual = median(latest)
        return usual if usual > 0 and norm > numbers.spike_factor * usual else None


def _is_norm(value: object) -> bool:
    return type(value) is float and math.isfinite(value) and value >= 0


class What(Enum):
    """Kinds of tensors in which the first number that is not finite can be."""

    PARAMETER = "the parameter"
    RECEIVED = "what was received from the stage before by"
    OUTPUT = "the output of"
    LOSS = "the loss of"
    OUTPUT_GRADIENT = "the gradient of the output of"
    PARAMETER_GRADIENT = "the gradient of the parameter"


@dataclass(frozen=True)
class Origin:
    """The first tensor of a step with numbers that are not finite, and the ranks that have it."""

    what: What
    name: str
    value: Literal["nan", "inf"]
    ranks: tuple[int, ...]
    microbatch: int | None
    """Its place among those of a replica; None for a parameter."""
    samples: tuple[int, ...]
    """Numbers of the samples of that microbatch."""

    @property
    def text(self) -> str:
        """The origin in words."""
        ranks = f"rank{'s' * (len(self.ranks) > 1)} {', '.join(map(str, self.ranks))}"
        named = f"{self.what.value} {self.name} on {ranks} ({self.value})"
        if self.microbatch is None:
            return named
        return f"{named}, in microbatch {self.microbatch} with samples {_few(self.samples)}"


@dataclass(frozen=True)
class Attribution:
    """Where an anomaly comes from."""

    tensors: Mapping[str, float | None]
    """Tensors whose gradients are not finite (None); for a spike, those with the largest shares of the squares."""
    origin: Origin | None = None
    recurs: bool = True
    """Whether the same step, computed again, is not finite again."""

    @property
    def text(self) -> str:
        """The attribution in words, without a full stop."""
        if self.origin is not None:
            return f"The first tensor that is not finite is {self.origin.text}"
        shares = [f"{name} {share:.0%}" for name, share in self.tensors.items() if share is not None]
        if shares:
            return f"Largest shares of its square: {', '.join(shares)}"
        names = f"those of {_few(list(self.tensors))}" if self.tensors else "none, only the loss"
        if self.recurs:
            return f"The gradients of each microbatch are finite, but not their sums; gradients concerned: {names}"
        return (
            "The same step computed again is finite: a transient fault, as of memory or of a device; gradients "
            f"concerned: {names}"
        )


@dataclass(frozen=True, kw_only=True)
class AnomalyReport:
    """All that is told of an anomaly; ``step`` counts from 1, ``warmup_setting`` is the one that this run has."""

    step: int
    samples: range
    anomaly: Anomaly
    attribution: Attribution
    warmup_setting: str

    @property
    def stops(self) -> bool:
        """Whether the run ends; also where a parameter is not finite, which no skipped step can mend."""
        origin = self.attribution.origin
        is_broken = origin is not None and origin.what is What.PARAMETER
        return is_broken or self.anomaly.consequence is Consequence.STOPPED

    @property
    def message(self) -> str:
        """What happened, where, what became of it, and the way out."""
        place = f"step {self.step} (samples {self.samples.start} to {self.samples.stop - 1})"
        return f"{place}: {self._finding()}. {self.attribution.text}. {self._end()}"

    def record(self) -> dict[str, object]:
        """One line of anomalies.jsonl."""
        origin, tensors = self.attribution.origin, self.attribution.tensors
        found = {} if origin is None else {**asdict(origin), "what": origin.what.name.lower()}
        return {
            "step": self.step,
            "samples": [self.samples.start, self.samples.stop - 1],
            "kind": "spike" if self.anomaly.is_spike else "not_finite",
            "consequence": (Consequence.STOPPED if self.stops else self.anomaly.consequence).value,
            "loss": _as_json(self.anomaly.loss),
            "grad_norm": _as_json(self.anomaly.norm),
            "usual_norm": self.anomaly.usual,
            "skipped_in_a_row": self.anomaly.skipped_in_a_row,
            "tensors": list(tensors)[:_MOST_RECORDED],
            "num_tensors": len(tensors),
            "shares": [share for share in tensors.values() if share is not None],
            "recurs": self.attribution.recurs,
            "origin": found or None,
        }

    def _finding(self) -> str:
        anomaly = self.anomaly
        if anomaly.usual is None:
            return f"loss {anomaly.loss}, gradient norm {anomaly.norm}; both must be finite"
        return (
            f"gradient norm {anomaly.norm:.4g} is {anomaly.norm / anomaly.usual:.1f} times the median of the "
            f"latest norms ({anomaly.usual:.4g}), more than run.anomalies.spike_factor"
        )

    def _end(self) -> str:
        if not self.stops:
            return _FATES[self.anomaly.consequence]
        kept = f"The weights are those after step {self.step - 1}"
        origin, skipped = self.attribution.origin, self.anomaly.skipped_in_a_row
        if origin is not None and origin.what is What.PARAMETER:
            return (
                f"{kept} and cannot be used. Start again, from the newest checkpoint; or in another "
                "run.directory, from an older one with run.resume="
            )
        if not self.attribution.recurs:
            return f"{kept}. Start again; where it comes back, leave out the host of this rank"
        key = "spike" if self.anomaly.is_spike else "not_finite"
        many = f", and {skipped} steps in a row were of no use (run.anomalies.most_skips)" if skipped > 1 else ""
        leave_out = "" if many else f", or leave such steps out with run.anomalies.{key}=skip"
        return (
            f"{kept}{many}. Lower optimizer.learning_rate, lengthen the warm-up ({self.warmup_setting}), or look "
            f"at these samples{leave_out}"
        )


_FATES = {
    Consequence.REPORTED: "The step is taken all the same",
    Consequence.SKIPPED: "The step is skipped: nothing has moved",
}


def _few(things: Sequence[object]) -> str:
    more = f" and {len(things) - _MOST_TOLD} more" if len(things) > _MOST_TOLD else ""
    return f"{', '.join(map(str, things[:_MOST_TOLD]))}{more}"


def _as_json(value: float) -> float | None:
    """Strict JSON has neither NaN nor Infinity."""
    return value if math.isfinite(value) else None
