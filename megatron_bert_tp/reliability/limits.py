"""How long a rank may be silent, by what it does."""

from dataclasses import dataclass

from megatron_bert_tp.reliability.actions import Kind
from megatron_bert_tp.reliability.slot import Action

LEAST_STEP_SECONDS = 60.0
_STEPS = 10
# A loader that gets no batch says so itself after `run.timeout_seconds`, and better than a watchdog could.
_MARGINS = {Kind.DATA: 2.0}
_LONG = (Kind.STARTING, Kind.DATA, Kind.EVALUATION, Kind.SAVING, Kind.DIAGNOSIS, Kind.ENDING)
# What comes after what within a step; all kinds between data and evaluation are one stretch.
_PLACES = {Kind.DATA: 0, Kind.EVALUATION: 2, Kind.SAVING: 3, Kind.AGREEMENT: 9, Kind.ENDING: 9}
_STRETCH = 1


def step_limit(given: float | None, median_seconds: float | None, *, longest: float) -> float:
    """Seconds of silence within a step: as given, else 10 median steps and 60 s at least; ``longest`` before any.

    Never more than ``longest``.
    """
    if given is not None:
        return min(given, longest)
    if median_seconds is None:
        return longest
    return min(max(LEAST_STEP_SECONDS, _STEPS * median_seconds), longest)


@dataclass(frozen=True)
class Limits:
    """Seconds of silence after which a rank counts as hanging: in a step, and in what may take long."""

    step: float
    long: float

    def of(self, kind: Kind) -> float:
        """The limit of an action."""
        return self.long + _MARGINS.get(kind, 0.0) if kind in _LONG else self.step

    def excuses(self, peer: Action, own: Action, *, now: float) -> bool:
        """Whether ``own`` may be waiting for what ``peer`` does, which may take long and has not taken too long.

        A peer that is ahead excuses nobody: it waits itself.  Nor does one that does the same as this rank, which
        has that time anyway.
        """
        is_in_time = now - peer.time <= self.of(peer.kind)
        is_behind = _position(peer) <= _position(own) and peer.kind is not own.kind
        return peer.kind in _LONG and is_in_time and is_behind


def _position(action: Action) -> tuple[int, int]:
    return action.step, _PLACES.get(action.kind, _STRETCH)
