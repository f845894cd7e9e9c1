"""What goes wrong on some rank: known to all where they agree, and told once, by whoever fails first."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from megatron_bert_tp.config.command_line import tell_error, wait_for_first_rank
from megatron_bert_tp.config.environment import LaunchEnvironment
from megatron_bert_tp.errors import (
    DataError,
    DirectoryError,
    ElsewhereError,
    ExitCode,
    MegatronBertError,
    PeerLostError,
    StoppedError,
)
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.reliability.outcome import Outcome, OutcomeFile

# What gloo and NCCL say when a peer has gone; torch has no class for it.
_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "socket timeout",
    "connection was likely closed",
    "remote process exited",
    "nccl communicator was aborted",
)
_PATIENCE = 2.0
"""Seconds for which a rank that has lost a peer lets that peer tell its own cause first."""


_WAYS_ON = {
    ExitCode.FINISHED: "nothing is left to do",
    ExitCode.BUG: "look at the cause; {}",
    ExitCode.BAD_SETTINGS: "mend the settings; {}",
    ExitCode.BAD_DATA: "mend the data; {}",
    ExitCode.BAD_CHECKPOINT: "give another checkpoint",
    ExitCode.NOT_FINITE: "look at the cause, which would come back; {}",
    ExitCode.CANNOT_WRITE: "make room, or the folder one that can be written; {}",
    ExitCode.RANKS_DIFFER: "leave out the hosts that are named; {}",
}


@dataclass
class Ending:
    """What is known of a run when it ends: where its outcome goes, and how far it is."""

    environment: LaunchEnvironment
    file: OutcomeFile | None = None
    steps_done: Callable[[], int | None] = field(default=lambda: None)
    checkpoint: Callable[[], str | None] = field(default=lambda: None)
    has_begun: bool = False
    """Whether a failure is being told."""
    way_on: str = "the same command goes on from there"
    missing_peers: Callable[[], str | None] = field(default=lambda: None)
    """Peers on this host that are gone, in words."""

    def outcome(self, code: ExitCode, cause: str, rank: int | None = None) -> Outcome:
        """Outcome of this rank, with where the run stands."""
        checkpoint = self.checkpoint()
        kept = "start again; there is no checkpoint" if checkpoint is None else self.way_on
        return Outcome(
            code=code,
            cause=cause,
            rank=self.environment.rank if rank is None else rank,
            step=self.steps_done(),
            checkpoint=checkpoint,
            next=_WAYS_ON.get(code, "").format(kept) or kept,
        )

    def is_failing(self) -> bool:
        """Whether this rank is on its way to its end, or will be as soon as it notices that a peer is gone."""
        return self.has_begun or self.missing_peers() is not None

    def claim_end(self, code: ExitCode, cause: str) -> None:
        """Write how the run ended, where another thread ends it; what others have written stays."""
        gone = self.missing_peers() if code is ExitCode.PEER_LOST else None
        self.claim(self.outcome(code, cause if gone is None else f"{gone} is gone"))

    def claim(self, outcome: Outcome) -> bool:
        """Whether this rank is the first to tell how the run ended."""
        return self.file is None or self.file.claim(outcome)


@contextmanager
def telling(ending: Ending) -> Iterator[None]:
    """Context manager inside the process group, around all that can fail: tells a failure, and raises it again.

    The rank that fails first tells it while its peers still hold a connection to it.  Peers that fail because
    of that add nothing.
    """
    try:
        yield
    except StoppedError:  # told where all ranks stop
        raise
    except (MegatronBertError, OSError) as error:
        ending.has_begun = True
        raise _told(as_ours(error), ending) from error
    except Exception as error:
        ending.has_begun = True
        if not is_peer_lost(error):
            if ending.claim(ending.outcome(ExitCode.BUG, f"{type(error).__name__}: {error}")):
                raise
            say_error(f"rank {ending.environment.rank} failed too: {type(error).__name__}: {error}")
            raise SystemExit(ExitCode.BUG) from error
        raise _peer_lost(error, ending) from error


class Recorder(ErrorHandler):
    """Writes the cause of a failure for torchrun: the message of our errors, the traceback of a bug."""

    def record_exception(self, e: BaseException) -> None:
        """Write ``e``, which is being handled."""
        if not isinstance(e, MegatronBertError):
            super().record_exception(e)
            return
        try:
            raise e.with_traceback(None) from None
        except MegatronBertError as bare:
            super().record_exception(bare)


@contextmanager
def together(agreement: Agreement) -> Iterator[None]:
    """Context manager around what one rank does for all; every rank enters it, and it ends like a barrier.

    Where it fails on a rank, all ranks raise, so that nobody waits for messages that never come.
    """
    failure: MegatronBertError | None = None
    try:
        yield
    except (MegatronBertError, OSError) as error:
        failure = as_ours(error)
    told = agreement.first(None if failure is None else f"{int(failure.exit_code)} {failure}")
    if told is None:
        return
    if failure is not None and told.rank == agreement.rank:
        raise failure
    code, _, text = told.text.partition(" ")
    raise ElsewhereError(text, rank=told.rank, exit_code=int(code))


def is_peer_lost(error: BaseException) -> bool:
    """Whether an error of torch says that another process is gone or silent."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _LOST)


def as_ours(error: MegatronBertError | OSError) -> MegatronBertError:
    """The error itself, or path, reason and way out of what the operating system refused."""
    if isinstance(error, MegatronBertError):
        return error
    place = "" if error.filename is None else f"{error.filename}: "
    kind = DataError if isinstance(error, FileNotFoundError) else DirectoryError
    refused = kind(f"{place}{error.strerror or error}; check the path, its permissions and the free space")
    refused.__cause__ = error
    return refused


def _told(error: MegatronBertError, ending: Ending) -> MegatronBertError:
    """Tell ``error`` if this rank is the first to."""
    rank = error.rank if isinstance(error, ElsewhereError) else ending.environment.rank
    outcome = ending.outcome(error.exit_code, str(error), rank)
    if ending.file is None:
        _tell_at_start(error, ending.environment)
    elif ending.claim(outcome):
        speaker = f" on rank {rank}" if ending.environment.world_size > 1 else ""
        say_error(f"error{speaker}: {error}\n{outcome.line()}")
    error.is_told = True
    return error


def _tell_at_start(error: MegatronBertError, environment: LaunchEnvironment) -> None:
    """Tell ``error`` where no file says yet who was first; what all ranks know rank 0 tells alone."""
    if isinstance(error, ElsewhereError) and not environment.is_first:
        wait_for_first_rank(environment)
    else:
        tell_error(str(error), environment)


def say_error(text: str) -> None:
    """Print on standard error, if it takes a word."""
    with suppress(OSError):  # standard error may be a file on the disk that is full
        print(text, file=sys.stderr, flush=True)


def _peer_lost(error: Exception, ending: Ending) -> MegatronBertError:
    """Let the peer tell its cause; if it cannot any more, tell that it is gone."""
    patience = time.monotonic() + _PATIENCE
    while time.monotonic() < patience and not _is_told_already(ending) and ending.missing_peers() is None:
        time.sleep(0.05)
    gone = ending.missing_peers()
    lost = PeerLostError(
        f"lost another rank: {str(error).splitlines()[0]:.300}"
        if gone is None
        else f"{gone} is gone: killed, or ended by the system, as for lack of memory"
    )
    if not _is_told_already(ending):
        return _told(lost, ending)
    # torchrun finds out by whole seconds who failed first.
    time.sleep(1.1)
    lost.is_told = True
    return lost


def _is_told_already(ending: Ending) -> bool:
    return ending.file is not None and ending.file.read() is not None
