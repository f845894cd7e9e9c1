"""What a run holds on one rank, whatever ends it: processes, folder, watchdog, signals."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from megatron_bert_tp.checkpoint.directories import candidates
from megatron_bert_tp.config.duration import seconds_of
from megatron_bert_tp.config.environment import LaunchEnvironment, slurm_job
from megatron_bert_tp.config.schema import ParallelConfig, RunConfig
from megatron_bert_tp.errors import ExitCode, StoppedError, TrainingError
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.parallel.mesh import ParallelMesh
from megatron_bert_tp.reliability.actions import Actions, Clock, HostClock, Kind
from megatron_bert_tp.reliability.board import Board, board_of_host
from megatron_bert_tp.reliability.device_clock import DeviceClock
from megatron_bert_tp.reliability.limits import Limits, step_limit
from megatron_bert_tp.reliability.lock import DirectoryLock
from megatron_bert_tp.reliability.outcome import OutcomeFile
from megatron_bert_tp.reliability.requeue import requeue
from megatron_bert_tp.reliability.signals import StopRequests
from megatron_bert_tp.reliability.visibility import check_visible
from megatron_bert_tp.reliability.watchdog import Watchdog
from megatron_bert_tp.training.failures import Ending, say_error, telling, together
from megatron_bert_tp.training.passes import Passes
from megatron_bert_tp.training.processes import (
    build_mesh,
    choose_device,
    end_with_launcher,
    keep_freed_memory,
    process_group,
)
from megatron_bert_tp.training.run_directory import CHECKPOINTS
from megatron_bert_tp.training.stopping import TIME_IS_UP, WARNING, Deadline, Stopping

_MARGIN_SECONDS = 5.0


@dataclass(frozen=True)
class Session:
    """What this rank is and holds while a run lasts."""

    run: RunConfig
    environment: LaunchEnvironment
    device: torch.device
    timeout: timedelta
    agreement: Agreement
    saving: Agreement
    """For the threads that save."""
    stop: StopRequests
    ending: Ending
    board: Board
    watchdog: Watchdog
    held: ExitStack
    """What is let go at the end, after the end was told: the last save, the watchdog, the lock."""
    began: float
    """Of the monotonic clock."""

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.environment.is_first

    def meet(self, parallel: ParallelConfig) -> tuple[ParallelMesh, Actions]:
        """The mesh, and what is told all that this rank does."""
        Actions(self.board).enter(Kind.STARTING, "meets the other ranks")
        mesh = build_mesh(
            self.environment,
            self.device,
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            ends=Passes(parallel).placement.ends,
            timeout=self.timeout,
        )
        return mesh, Actions(self.board, _clock(mesh, self.device), pipeline_ranks=mesh.pipeline.ranks)

    def say(self, text: str) -> None:
        """Lines on the console, from the first rank; a console that is gone ends no run."""
        if self.is_first:
            with suppress(OSError):
                print(text, flush=True)

    def narrator(self, actions: Actions) -> Callable[[str], None]:
        """What hears of all that takes its time at the start."""

        def say(text: str) -> None:
            actions.enter(Kind.STARTING, text)
            self.say(text)

        return say

    @property
    def stopping(self) -> Stopping:
        """What this rank asks, between two pieces of work, whether all of them stop."""
        limit = None if self.run.stop_after is None else seconds_of(self.run.stop_after)
        deadline = None if limit is None else Deadline(self.began, limit)
        return Stopping(lambda: self.stop.requested, self.agreement, deadline=deadline)

    def stop_if_asked(
        self, before: str, *, kept: str = "all is saved, and the same command goes on from there"
    ) -> None:
        """StoppedError, told, where any rank was asked to stop; ``kept`` says what is there of the work so far."""
        reason, _ = self.stopping.agree(is_writing=False, step_seconds=0.0, save_seconds=0.0)
        if reason is not None:
            error = StoppedError(f"stopped {before} ({reason}); {kept}", reason=reason)
            self.tell_stop(error)
            raise error

    def tell_stop(self, error: StoppedError) -> None:
        """Tell a stop, and put the job back into SLURM's queue where that is wanted, while all ranks are here.

        A job that is cancelled gets a SIGTERM, and shall not come back.
        """
        error.is_told = True
        if self.is_first:
            outcome = self.ending.outcome(ExitCode.STOPPED, str(error))
            self.ending.claim(outcome)
            say_error(f"{error}\n{outcome.line()}")
            if self.run.requeue and error.reason in (TIME_IS_UP, WARNING):
                _requeue()
        self.agreement.wait()

    def tell_end(self, actions: Actions) -> None:
        """Tell that all is done, and wait for the other ranks."""
        if self.is_first:
            self.ending.claim(self.ending.outcome(ExitCode.FINISHED, "finished"))
        actions.enter(Kind.ENDING, "waits for the other ranks")
        self.agreement.wait()


@contextmanager
def session(run: RunConfig, environment: LaunchEnvironment, *, folders: tuple[str, ...] = ()) -> Iterator[Session]:
    """Context manager around all that a run does on this rank.

    What ends the run early is told and written to `exit.json` before it is raised (`training.failures`).
    ``folders`` are further ones that all ranks must see; they may be read-only.
    """
    began = time.monotonic()
    keep_freed_memory()
    device = choose_device(run.device, environment.local_rank)
    # Longer than the watchdog waits: it tells more than a message that does not come.
    timeout = timedelta(seconds=run.timeout_seconds + _MARGIN_SECONDS)
    launcher = os.getppid() if environment.is_launched else None
    ending = Ending(environment)
    end_with_launcher(environment)
    with ExitStack() as stack:
        # Until the ranks have met, a signal just ends them: there is nothing to save, and they may wait for long.
        stack.enter_context(process_group(environment, device, timeout))
        stop = stack.enter_context(StopRequests(is_failing=ending.is_failing, on_end=ending.claim_end))
        # Outside of `telling`, and so after it: the last save is waited for, then the watchdog and the lock go.
        held = stack.enter_context(ExitStack())
        stack.enter_context(telling(ending))
        agreement, saving = Agreement.of_world(timeout), Agreement.of_world(timeout)
        _occupy(run, ending, agreement, held=held, folders=folders)
        board = board_of_host(
            agreement, local_rank=environment.local_rank, local_world_size=environment.local_world_size
        )
        watchdog = held.enter_context(_watchdog(run, ending, board, stop=stop, launcher=launcher))
        yield Session(
            run, environment, device, timeout, agreement, saving, stop, ending, board, watchdog, held, began
        )


def _occupy(
    run: RunConfig, ending: Ending, agreement: Agreement, *, held: ExitStack, folders: tuple[str, ...]
) -> None:
    """Make the folder of the run, hold it alone, and see that all ranks see it."""
    directory = Path(run.directory)
    with together(agreement):
        if ending.environment.is_first:
            if directory.exists() and not directory.is_dir():
                raise FileExistsError(17, "is a file; choose a folder, new or of the same run", str(directory))
            directory.mkdir(parents=True, exist_ok=True)
            held.enter_context(DirectoryLock(directory))
            OutcomeFile(directory).clear()
    check_visible(directory, agreement, what="run.directory")
    ending.file = OutcomeFile(directory)
    newest = next(iter(candidates(directory / CHECKPOINTS)), None)
    ending.checkpoint = lambda: None if newest is None else str(newest)
    if run.resume != "auto":
        ending.way_on = "the same command with run.resume=auto goes on from there"
    for folder in folders:
        check_visible(Path(folder), agreement, what="run.index_cache", may_be_read_only=True)
    if agreement.maximum([(directory / CHECKPOINTS).exists()])[0]:  # it may be a mount or a link of its own
        check_visible(directory / CHECKPOINTS, agreement, what="the checkpoints of run.directory")


def _watchdog(
    run: RunConfig, ending: Ending, board: Board, *, stop: StopRequests, launcher: int | None
) -> Watchdog:
    seconds = run.timeout_seconds
    ending.missing_peers = board.missing
    return Watchdog(
        board,
        Limits(step=step_limit(run.step_timeout_seconds, None, longest=seconds), long=seconds),
        on_hang=lambda cause: ending.claim_end(ExitCode.HANG, cause),
        on_orphaned=lambda: stop.request("the launcher is gone"),
        launcher=launcher,
    )


def _clock(mesh: ParallelMesh, device: torch.device) -> Clock:
    """Times the work of this rank; its waiting for others apart, where the host knows of it."""
    if device.type == "cuda":
        return DeviceClock()
    axes = (mesh.tensor, mesh.data, mesh.pipeline, mesh.tied)
    return HostClock(lambda: sum(axis.waits.seconds for axis in axes))


def _requeue() -> None:
    try:
        say_error(requeue(slurm_job()))
    except TrainingError as error:  # all is saved: it is a stop like any other
        say_error(f"warning: {error}")
