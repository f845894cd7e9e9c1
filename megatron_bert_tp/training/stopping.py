"""When a run stops before its last step: signals, the time that it was given, a launcher that is gone."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_bert_tp.parallel.agreement import Agreement

TIME_IS_UP, WARNING = "run.stop_after", "SIGUSR1"
"""Reasons after which a job should be run again: its time is over, or SLURM has said that it soon will be."""
_OTHER = "another request"
_REASONS = (None, _OTHER, TIME_IS_UP, "the launcher is gone", "SIGHUP", WARNING, "SIGTERM", "SIGINT")
"""What can end a run early; where ranks have several reasons, the last of these counts."""
_BYTES_A_SECOND = 100e6
"""Speed of the first save, before one is measured: that of a slow shared disk."""


@dataclass(frozen=True)
class Deadline:
    """A run must have ended ``seconds`` after ``started`` (of the monotonic clock), its last save included."""

    started: float
    seconds: float

    def is_near(
        self, now: float, *, step_seconds: float, save_seconds: float, more_seconds: float = 0.0
    ) -> bool:
        """Whether another step, of twice the usual length, and a save half as long again might come too late.

        ``more_seconds`` is what else comes before: an evaluation, or the rest of a save.
        """
        return now - self.started + 2 * step_seconds + 1.5 * save_seconds + more_seconds >= self.seconds


def first_save_seconds(num_bytes: int) -> float:
    """How long the first save is taken to last, all ranks writing to one disk."""
    return num_bytes / _BYTES_A_SECOND


class Stopping:
    """This rank's reasons to stop, and what all ranks make of theirs."""

    def __init__(
        self, requested: Callable[[], str | None], agreement: Agreement, *, deadline: Deadline | None = None
    ) -> None:
        """``requested`` gives the name of a signal that this rank has got."""
        self._requested, self._agreement, self._deadline = requested, agreement, deadline

    def agree(
        self, *, is_writing: bool, step_seconds: float, save_seconds: float, more_seconds: float = 0.0
    ) -> tuple[str | None, bool]:
        """Why all ranks stop now (None: they go on), and whether a rank still writes a checkpoint.

        One message of two numbers; every rank calls it after every step.
        """
        more_seconds += save_seconds if is_writing else 0
        own = self._reason(step_seconds, save_seconds, more_seconds)
        reason, writing = self._agreement.maximum([_REASONS.index(own), is_writing])
        return _REASONS[reason], bool(writing)

    def _reason(self, step_seconds: float, save_seconds: float, more_seconds: float) -> str | None:
        requested = self._requested()
        if requested is not None:
            return requested if requested in _REASONS else _OTHER
        is_late = self._deadline is not None and self._deadline.is_near(
            time.monotonic(), step_seconds=step_seconds, save_seconds=save_seconds, more_seconds=more_seconds
        )
        return TIME_IS_UP if is_late else None
