"""A pretraining run on one rank, from its start to its end, whatever ends it."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from rich.console import Console

from megatron_bert_tp.checkpoint.background import Saver
from megatron_bert_tp.checkpoint.directories import Keep, candidates
from megatron_bert_tp.config.duration import seconds_of
from megatron_bert_tp.config.environment import LaunchEnvironment, slurm_job
from megatron_bert_tp.config.schema import Config
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
from megatron_bert_tp.training.build import build_trainer, stage_plans
from megatron_bert_tp.training.failures import Ending, say_error, telling, together
from megatron_bert_tp.training.loop import Loop
from megatron_bert_tp.training.passes import Passes
from megatron_bert_tp.training.processes import (
    build_mesh,
    choose_device,
    end_with_launcher,
    keep_freed_memory,
    peak_memory,
    process_group,
)
from megatron_bert_tp.training.progress import MetricsFile, Reporter, keep_records
from megatron_bert_tp.training.resume import Beginning, beginning
from megatron_bert_tp.training.run_directory import ANOMALIES, CHECKPOINTS, RunDirectory, keep_settings
from megatron_bert_tp.training.stopping import TIME_IS_UP, WARNING, Deadline, Stopping
from megatron_bert_tp.training.supervision import Supervision
from megatron_bert_tp.training.telling import opening, reading
from megatron_bert_tp.training.texts import open_texts
from megatron_bert_tp.training.trainer import Trainer

METRICS = "metrics.jsonl"
_MARGIN_SECONDS = 5.0


@dataclass(frozen=True)
class Rank:
    """What this rank is and holds while a run lasts."""

    config: Config
    environment: LaunchEnvironment
    device: torch.device
    timeout: timedelta
    agreement: Agreement
    stop: StopRequests
    ending: Ending
    began: float
    """Of the monotonic clock."""

    @property
    def directory(self) -> Path:
        """Folder of the run."""
        return Path(self.config.run.directory)


def pretrain(config: Config, environment: LaunchEnvironment) -> None:
    """Run ``config`` on this rank, from the newest checkpoint to the last step.

    What ends the run early is told and written to `exit.json` before it is raised (`training.failures`).
    StoppedError when it was asked to stop, with all steps saved; with ``run.requeue`` SLURM runs the job again.
    """
    began = time.monotonic()
    keep_freed_memory()
    device = choose_device(config.run.device, environment.local_rank)
    # Longer than the watchdog waits: it tells more than a message that does not come.
    timeout = timedelta(seconds=config.run.timeout_seconds + _MARGIN_SECONDS)
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
        agreement = Agreement.of_world(timeout)
        rank = Rank(config, environment, device, timeout, agreement, stop, ending, began)
        _occupy(rank, held)
        board = board_of_host(
            agreement, local_rank=environment.local_rank, local_world_size=environment.local_world_size
        )
        watchdog = held.enter_context(_watchdog(rank, board, launcher))
        _run(rank, board, watchdog, held)


def _occupy(rank: Rank, held: ExitStack) -> None:
    """Make the folder of the run, hold it alone, and see that all ranks see it."""
    directory, config = rank.directory, rank.config
    with together(rank.agreement):
        if rank.environment.is_first:
            if directory.exists() and not directory.is_dir():
                raise FileExistsError(17, "is a file; choose a folder, new or of the same run", str(directory))
            directory.mkdir(parents=True, exist_ok=True)
            held.enter_context(DirectoryLock(directory))
            OutcomeFile(directory).clear()
    check_visible(directory, rank.agreement, what="run.directory")
    rank.ending.file = OutcomeFile(directory)
    newest = next(iter(candidates(directory / CHECKPOINTS)), None)
    rank.ending.checkpoint = lambda: None if newest is None else str(newest)
    if config.run.resume != "auto":
        rank.ending.way_on = "the same command with run.resume=auto goes on from there"
    if config.run.index_cache is not None:
        cache = Path(config.run.index_cache)
        check_visible(cache, rank.agreement, what="run.index_cache", may_be_read_only=True)
    if rank.agreement.maximum([(directory / CHECKPOINTS).exists()])[0]:  # it may be a mount or a link of its own
        check_visible(directory / CHECKPOINTS, rank.agreement, what="the checkpoints of run.directory")


def _watchdog(rank: Rank, board: Board, launcher: int | None) -> Watchdog:
    ending, seconds = rank.ending, rank.config.run.timeout_seconds
    ending.missing_peers = board.missing
    return Watchdog(
        board,
        Limits(step=step_limit(rank.config.run.step_timeout_seconds, None, longest=seconds), long=seconds),
        on_hang=lambda cause: ending.claim_end(ExitCode.HANG, cause),
        on_orphaned=lambda: rank.stop.request("the launcher is gone"),
        launcher=launcher,
    )


def _run(rank: Rank, board: Board, watchdog: Watchdog, held: ExitStack) -> None:
    """Build what trains, train, and tell how it ended."""
    config, environment, agreement = rank.config, rank.environment, rank.agreement
    Actions(board).enter(Kind.STARTING, "meets the other ranks")
    mesh = build_mesh(
        environment,
        rank.device,
        tensor=config.parallel.tensor,
        pipeline=config.parallel.pipeline,
        ends=Passes(config.parallel).placement.ends,
        timeout=rank.timeout,
    )
    actions = Actions(board, _clock(mesh, rank.device), pipeline_ranks=mesh.pipeline.ranks)
    actions.enter(Kind.STARTING, "opens the corpora")
    texts = open_texts(config, mesh.data, say=_narrator(actions, environment))
    begin = beginning(
        config,
        agreement,
        texts.fingerprints,
        is_restart=environment.restarts > 0,
        say=lambda name: actions.enter(Kind.STARTING, f"verifies {name}"),
    )
    actions.enter(Kind.STARTING, "builds the model")
    trainer = build_trainer(
        config, mesh, texts, agreement=agreement, device=rank.device, checkpoint=begin.checkpoint, actions=actions
    )
    is_finished = trainer.steps_done >= config.optimizer.steps
    with together(agreement):
        if environment.is_first and not is_finished:
            keep_settings(config)
    directory = _directory(rank, trainer, begin, held=held, actions=actions)
    directory.say(opening(config, environment, trainer, begin, plans=stage_plans(config)))
    begun = trainer.samples_done
    try:
        Loop(trainer, directory, _supervision(rank, actions, watchdog)).run()
    except StoppedError as error:
        _tell_stop(rank, error)
        raise
    _tell_end(rank, trainer, directory, begun=begun)
    actions.enter(Kind.ENDING, "waits for the other ranks")
    agreement.wait()


def _narrator(actions: Actions, environment: LaunchEnvironment) -> Callable[[str], None]:
    """What hears of all that takes its time at the start."""

    def say(text: str) -> None:
        actions.enter(Kind.STARTING, text)
        if environment.is_first:
            print(text)

    return say


def _clock(mesh: ParallelMesh, device: torch.device) -> Clock:
    """Times the work of this rank; its waiting for others apart, where the host knows of it."""
    if device.type == "cuda":
        return DeviceClock()
    axes = (mesh.tensor, mesh.data, mesh.pipeline, mesh.tied)
    return HostClock(lambda: sum(axis.waits.seconds for axis in axes))


def _directory(
    rank: Rank, trainer: Trainer, begin: Beginning, *, held: ExitStack, actions: Actions
) -> RunDirectory:
    config = rank.config
    is_first = rank.environment.is_first
    if is_first:
        keep_records(rank.directory / ANOMALIES, trainer.steps_done)
    reporter = held.enter_context(_reporter(config, trainer.steps_done)) if is_first else None
    saver = Saver(
        rank.directory / CHECKPOINTS,
        Agreement.of_world(rank.timeout),
        keep=Keep(config.run.keep_last, config.run.keep_every),
        in_background=config.run.save_in_background,
    )
    held.callback(saver.wait)
    held.callback(actions.enter, Kind.SAVING, "waits for the checkpoint that is being written")
    directory = RunDirectory(
        config,
        mesh=trainer.mesh,
        agreement=rank.agreement,
        saver=saver,
        reporter=reporter,
        fingerprints=trainer.texts.fingerprints,
        start=None if begin.checkpoint is None else begin.checkpoint.directory,
    )
    trainer.on_anomaly = directory.report_anomaly
    rank.ending.steps_done = lambda: trainer.steps_done
    rank.ending.checkpoint = directory.newest_checkpoint
    return directory


def _supervision(rank: Rank, actions: Actions, watchdog: Watchdog) -> Supervision:
    run = rank.config.run
    limit = None if run.stop_after is None else seconds_of(run.stop_after)
    deadline = None if limit is None else Deadline(rank.began, limit)
    return Supervision(
        actions=actions,
        agreement=rank.agreement,
        stopping=Stopping(lambda: rank.stop.requested, rank.agreement, deadline=deadline),
        watchdog=watchdog,
        run=run,
    )


def _tell_stop(rank: Rank, error: StoppedError) -> None:
    """Tell it, and put the job back into SLURM's queue where that is wanted, while all ranks are still here.

    A job that is cancelled gets a SIGTERM, and shall not come back.
    """
    error.is_told = True
    if rank.environment.is_first:
        outcome = rank.ending.outcome(ExitCode.STOPPED, str(error))
        rank.ending.claim(outcome)
        say_error(f"{error}\n{outcome.line()}")
        if rank.config.run.requeue and error.reason in (TIME_IS_UP, WARNING):
            _requeue()
    rank.agreement.wait()


def _requeue() -> None:
    try:
        say_error(requeue(slurm_job()))
    except TrainingError as error:  # all is saved: it is a stop like any other
        say_error(f"warning: {error}")


def _tell_end(rank: Rank, trainer: Trainer, directory: RunDirectory, *, begun: int) -> None:
    if trainer.samples_done > begun:
        directory.say(reading(trainer.texts.source, begun, trainer.samples_done))
    directory.say(f"peak memory of a rank: {peak_memory(trainer.mesh, rank.device):.2f} GiB")
    if rank.environment.is_first:
        rank.ending.claim(rank.ending.outcome(ExitCode.FINISHED, "finished"))


def _reporter(config: Config, steps_done: int) -> Reporter:
    metrics = MetricsFile(Path(config.run.directory) / METRICS, steps_done=steps_done)
    return Reporter(
        metrics,
        Console(),
        steps=config.optimizer.steps,
        steps_done=steps_done,
        log_every=config.run.log_every,
        pairs=config.objective.pairs,
        shows_scale=config.optimizer.precision == "float16",
    )
