"""The course of one training, within a session: its folder, its supervision, its loop and how it ends."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from rich.console import Console

from megatron_bert_tp.checkpoint.background import Saver
from megatron_bert_tp.checkpoint.directories import Keep
from megatron_bert_tp.errors import StoppedError
from megatron_bert_tp.reliability.actions import Actions, Kind
from megatron_bert_tp.training.evaluation import Evaluation
from megatron_bert_tp.training.failures import together
from megatron_bert_tp.training.loop import Loop
from megatron_bert_tp.training.processes import peak_memory
from megatron_bert_tp.training.progress import METRICS, Lines, MetricsFile, Reporter, keep_records
from megatron_bert_tp.training.recipe import Recipe
from megatron_bert_tp.training.resume import Beginning
from megatron_bert_tp.training.run_directory import ANOMALIES, CHECKPOINTS, RunDirectory, keep_settings
from megatron_bert_tp.training.session import Session
from megatron_bert_tp.training.supervision import Supervision
from megatron_bert_tp.training.telling import opening
from megatron_bert_tp.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Course:
    """One training from where it begins to its last step.

    ``reads`` are lines on what it reads, ``reading`` tells at the end what it has read between two numbers of
    samples, ``lines`` are how steps and evaluations look on the console.
    """

    recipe: Recipe
    trainer: Trainer
    begin: Beginning
    evaluation: Evaluation
    lines: Lines
    reads: Sequence[str] = ()
    reading: Callable[[int, int], str] | None = None
    keeps: int | None = None
    """Step of the checkpoint that is not to be removed when the training begins."""

    def run(self, within: Session, actions: Actions) -> None:
        """Train to the end; StoppedError, told, where it was asked to stop, with all saved."""
        trainer, own = self.trainer, within.held.enter_context(ExitStack())
        directory = self._directory(within, actions, own)
        loop = Loop(trainer, directory, self._supervision(within, actions), self.evaluation)
        with together(within.agreement):
            if within.is_first and not loop.is_over:
                keep_settings(self.recipe)
        directory.say(
            opening(self.recipe, within.environment, trainer, self.begin, reads=self.reads)
        )
        begun = trainer.samples_done
        try:
            loop.run()
        except StoppedError as error:
            within.tell_stop(error)
            raise
        if self.reading is not None and trainer.samples_done > begun:
            directory.say(self.reading(begun, trainer.samples_done))
        directory.say(f"peak memory of a rank: {peak_memory(trainer.mesh, within.device):.2f} GiB")
        own.close()
        done = trainer.steps_done
        within.ending.steps_done = lambda: done  # the trainer must not outlive its training: others may follow

    def _directory(self, within: Session, actions: Actions, own: ExitStack) -> RunDirectory:
        """The folder; ``own`` gets what must be closed, also where the run fails."""
        run, path = self.recipe.run, self.recipe.directory
        if within.is_first:
            keep_records(path / ANOMALIES, self.trainer.steps_done)
        reporter = own.enter_context(self._reporter()) if within.is_first else None
        saver = Saver(
            path / CHECKPOINTS,
            within.saving,
            keep=Keep(run.keep_last, run.keep_every, self.keeps),
            in_background=run.save_in_background,
        )
        own.callback(saver.wait)
        own.callback(actions.enter, Kind.SAVING, "waits for the checkpoint that is being written")
        directory = RunDirectory(
            self.recipe,
            mesh=self.trainer.mesh,
            agreement=within.agreement,
            saver=saver,
            reporter=reporter,
            start=None if self.begin.checkpoint is None else self.begin.checkpoint.directory,
        )
        self.trainer.on_anomaly = directory.report_anomaly
        within.ending.steps_done = lambda: self.trainer.steps_done
        within.ending.checkpoint = directory.newest_checkpoint
        return directory

    def _reporter(self) -> Reporter:
        optimizer, steps_done = self.recipe.optimizer, self.trainer.steps_done
        return Reporter(
            MetricsFile(self.recipe.directory / METRICS, steps_done=steps_done),
            Console(),
            steps=optimizer.steps,
            steps_done=steps_done,
            log_every=self.recipe.run.log_every,
            lines=self.lines,
        )

    def _supervision(self, within: Session, actions: Actions) -> Supervision:
        return Supervision(
            actions=actions,
            agreement=within.agreement,
            stopping=within.stopping,
            watchdog=within.watchdog,
            run=self.recipe.run,
        )
