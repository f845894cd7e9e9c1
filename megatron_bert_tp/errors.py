"""Errors that a user can act on: each message names the rule, the value and the way out.

Each class has the exit code of a process that it ends; docs/reliability.md lists all codes.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a process of this package ends; torchrun itself turns every failure of a rank into 1."""

    FINISHED = 0
    BUG = 1
    BAD_SETTINGS = 2
    BAD_DATA = 3
    BAD_CHECKPOINT = 4
    NOT_FINITE = 5
    HANG = 6
    PEER_LOST = 7
    CANNOT_WRITE = 8
    RANKS_DIFFER = 9
    STOPPED = 75
    """Stopped before the last step by a signal or `run.stop_after`, with all steps saved (EX_TEMPFAIL)."""
    INTERRUPTED = 130


class MegatronBertError(Exception):
    """Base of all errors whose message is meant for the user; entry points print it and exit with its code."""

    exit_code = ExitCode.BAD_SETTINGS
    is_told = False
    """Whether it has been printed already."""


class ElsewhereError(MegatronBertError):
    """What ``rank`` has failed with, raised on the ranks that were told of it."""

    def __init__(self, text: str, *, rank: int, exit_code: int) -> None:
        super().__init__(text)
        self.rank, self.exit_code = rank, ExitCode(exit_code)


class ConfigError(MegatronBertError):
    """One or more settings are wrong; the message lists all of them."""


class LayoutError(MegatronBertError):
    """Sizes do not fit the requested tensor x pipeline x data layout."""


class DataError(MegatronBertError):
    """A corpus, vocabulary or sample is missing, damaged or cannot be used."""

    exit_code = ExitCode.BAD_DATA


class ScheduleError(MegatronBertError):
    """A pipeline schedule deadlocks or does not fit the number of stages."""


class CheckpointError(MegatronBertError):
    """A checkpoint is missing, damaged or belongs to another model."""

    exit_code = ExitCode.BAD_CHECKPOINT


class SaveError(CheckpointError):
    """A checkpoint cannot be written."""

    exit_code = ExitCode.CANNOT_WRITE


class FormatError(MegatronBertError):
    """A foreign weight file cannot be read as a MegatronBert."""

    exit_code = ExitCode.BAD_CHECKPOINT


class TrainingError(MegatronBertError):
    """A run cannot start or go on."""


class NotFiniteError(TrainingError):
    """A loss or gradient is no finite number, or is a spike; the weights are those before it."""

    exit_code = ExitCode.NOT_FINITE


class RanksDifferError(TrainingError):
    """Ranks that must hold equal parameters do not."""

    exit_code = ExitCode.RANKS_DIFFER


class DirectoryError(TrainingError):
    """The folder of a run cannot be written, is not seen by all hosts, or belongs to another job."""

    exit_code = ExitCode.CANNOT_WRITE


class StoppedError(TrainingError):
    """A run was asked to stop before its last step, for ``reason``, and has saved all that it has done."""

    exit_code = ExitCode.STOPPED

    def __init__(self, text: str, *, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


class PeerLostError(TrainingError):
    """Another rank is gone, or has told that it fails."""

    exit_code = ExitCode.PEER_LOST


class ArgumentError(MegatronBertError, ValueError):
    """An argument of a model's method is missing, misshapen or cannot work with this model."""
