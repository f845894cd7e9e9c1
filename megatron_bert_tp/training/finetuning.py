"""Fine-tuning on a task, on one rank: one training for each seed, its best checkpoint exported and evaluated."""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_bert_tp.checkpoint.choose import verified
from megatron_bert_tp.checkpoint.directories import step_directory
from megatron_bert_tp.checkpoint.load import load_parts_
from megatron_bert_tp.config.dump import to_yaml
from megatron_bert_tp.config.environment import LaunchEnvironment
from megatron_bert_tp.config.task_schema import TaskRun
from megatron_bert_tp.errors import ConfigError
from megatron_bert_tp.formats.convert import to_huggingface
from megatron_bert_tp.formats.task_folder import BEST_MODEL, EVALUATED, RESULT, seed_folder, seed_folders
from megatron_bert_tp.parallel.mesh import ParallelMesh
from megatron_bert_tp.reliability.actions import Actions, Kind
from megatron_bert_tp.reliability.lock import DirectoryLock
from megatron_bert_tp.tasks.batches import TaskBatches
from megatron_bert_tp.training.build import build_trainer
from megatron_bert_tp.training.course import Course
from megatron_bert_tp.training.failures import together
from megatron_bert_tp.training.outputs import outputs_of
from megatron_bert_tp.training.recipe import Recipe
from megatron_bert_tp.training.resume import beginning
from megatron_bert_tp.training.run_directory import CHECKPOINTS, SETTINGS_FILE, keep_settings
from megatron_bert_tp.training.session import Session, session
from megatron_bert_tp.training.task_data import TaskData, TaskPart, batches_of, open_task_data
from megatron_bert_tp.training.task_evaluation import (
    THRESHOLD,
    NoEvaluation,
    TaskEvaluation,
    TaskLines,
    check_validation_metric,
    metric_of,
    scored,
    standing_of,
)
from megatron_bert_tp.training.task_recipe import steps_between_evaluations, task_objective, task_recipe
from megatron_bert_tp.training.task_results import (
    Result,
    read_result,
    remove_parts,
    summary_lines,
    write_part,
    write_result,
    write_summary,
)
from megatron_bert_tp.training.trainer import Trainer


def finetune(config: TaskRun, environment: LaunchEnvironment) -> None:
    """Train ``config`` on this rank, for each of its seeds, and measure what came of it.

    What ends it early is told as by `training.pretraining.pretrain`, and the same command goes on.
    """
    _check_folder(config)
    with session(config.run, environment) as within:
        mesh, actions = within.meet(config.parallel)
        data = open_task_data(config, verifies=mesh.is_first, learns=True, say=within.narrator(actions))
        check_validation_metric(config, data)
        tuning = _Tuning(config, data, mesh, actions, within)
        results = {seed: tuning.of_seed(seed) for seed in config.run.seeds or (config.optimizer.seed,)}
        with together(within.agreement):
            if within.is_first and config.run.seeds is not None:
                write_summary(Path(config.run.directory), results)
                for line in summary_lines(results):
                    within.say(line)
        within.tell_end(actions)


@dataclass(frozen=True)
class _Tuning:
    """What the trainings of all seeds share."""

    config: TaskRun
    data: TaskData
    mesh: ParallelMesh
    actions: Actions
    within: Session

    def of_seed(self, seed: int) -> Result:
        """Train, export and measure; what an earlier start has finished is only told."""
        config = self._config_of(seed)
        directory, agreement = Path(config.run.directory), self.within.agreement
        result, own = None, self.within.held.enter_context(ExitStack())
        self.within.stop_if_asked(f"before {directory}")
        if self.config.run.seeds is not None:
            self.within.say(f"seed {seed}: {directory}")
        with together(agreement):
            if self.within.is_first:
                if self.config.run.seeds is not None:
                    directory.mkdir(parents=True, exist_ok=True)
                    own.enter_context(DirectoryLock(directory))
                result = _finished(config, self.data)
        if agreement.maximum([result is not None])[0]:
            self.within.say(f"{directory}: is already finished")
        else:
            result = self._make(config)
        own.close()
        return result or Result(seed, 0, metric_of(config), {}, {})

    def _make(self, config: TaskRun) -> Result:
        directory, recipe = Path(config.run.directory), task_recipe(config, self.data)
        trainer, best = self._train(config, recipe)
        self.within.stop_if_asked(f"before the export to {directory / BEST_MODEL}")
        with together(self.within.agreement):
            if self.within.is_first:
                keep_settings(recipe)
        return self._conclude(config, trainer, best)

    def _config_of(self, seed: int) -> TaskRun:
        """Settings of one seed, in a folder of its own where there are several."""
        run = self.config.run
        folder = run.directory if run.seeds is None else str(seed_folder(Path(run.directory), seed))
        return replace(
            self.config,
            optimizer=replace(self.config.optimizer, seed=seed),
            run=replace(run, directory=folder, seeds=None),
        )

    def _batches(self, config: TaskRun, part: TaskPart) -> TaskBatches:
        return batches_of(
            part,
            config,
            self.data.source,
            self.mesh.data,
            seed=config.optimizer.seed,
        )

    def _train(self, config: TaskRun, recipe: Recipe) -> tuple[Trainer, Path]:
        """The trainer after its last step, and the checkpoint of its best evaluation."""
        training = self.data.training
        assert training is not None, "the rules of the settings ask for it"
        begin = beginning(
            recipe,
            self.within.agreement,
            is_restart=self.within.environment.restarts > 0,
            say=lambda name: self.actions.enter(Kind.STARTING, f"verifies {name}"),
        )
        self.actions.enter(Kind.STARTING, "builds the model")
        trainer = build_trainer(
            recipe,
            self.mesh,
            task_objective(config, recipe, self.data, self.mesh.tensor),
            self._batches(config, training).take,
            agreement=self.within.agreement,
            device=self.within.device,
            checkpoint=begin.checkpoint,
            actions=self.actions,
        )
        evaluation = self._evaluation(config, recipe, trainer)
        with together(self.within.agreement):
            if self.within.is_first:  # before the new settings stand beside it: they would seem to be finished
                (recipe.directory / RESULT).unlink(missing_ok=True)
        Course(
            recipe=recipe,
            trainer=trainer,
            begin=begin,
            evaluation=evaluation,
            lines=TaskLines(config.optimizer.precision == "float16"),
            keeps=evaluation.best_step,
        ).run(self.within, self.actions)
        best_step = evaluation.best_step
        if evaluation.is_over and trainer.steps_done < recipe.optimizer.steps:
            since = "has been saved" if best_step is None else f"since step {best_step} was better"
            self.within.say(
                f"ends after step {trainer.steps_done} of {recipe.optimizer.steps}: run.patience = "
                f"{config.run.patience}, and nothing {since}"
            )
        step = best_step or trainer.steps_done
        best = step_directory(recipe.directory / CHECKPOINTS, step)
        is_old = begin.checkpoint is not None and begin.checkpoint.step == step and not best.exists()
        return trainer, begin.checkpoint.directory if is_old and begin.checkpoint else best

    def _evaluation(self, config: TaskRun, recipe: Recipe, trainer: Trainer) -> TaskEvaluation | NoEvaluation:
        part, training = self.data.validation, self.data.training
        standing = standing_of(
            recipe.directory,
            config,
            self.data,
            trainer.steps_done,
            agreement=self.within.agreement,
            say=self.within.say,
        )
        if part is None or training is None:
            return NoEvaluation()
        return TaskEvaluation(
            config,
            self.data,
            self._batches(config, part),
            agreement=self.within.agreement,
            every=steps_between_evaluations(config, training.table.num_samples),
            last_step=recipe.optimizer.steps,
            standing=standing,
        )

    def _conclude(self, config: TaskRun, trainer: Trainer, best: Path) -> Result:
        """Take the best checkpoint, write it as a Hugging Face directory, and its predictions."""
        directory, agreement = Path(config.run.directory), self.within.agreement
        self.actions.enter(Kind.SAVING, f"verifies {best}")
        checkpoint = verified(best, agreement)
        self.actions.enter(Kind.SAVING, f"exports {best}")
        with together(agreement):
            if self.within.is_first:
                _export(best, directory / BEST_MODEL)
                self.within.say(f"{directory / BEST_MODEL}: Hugging Face directory of step {checkpoint.step}")
        with together(agreement):
            if checkpoint.step != trainer.steps_done:
                load_parts_(trainer.chunks.parts(), checkpoint.weight)
        metrics: dict[str, Mapping[str, float]] = {}
        threshold = 0.0
        for name, part in (("validation", self.data.validation), ("test", self.data.test)):
            if part is not None:
                self.within.stop_if_asked(f"before the predictions of {name}")
                metrics[name] = self._measure(config, trainer, name, part, threshold)
                threshold = metrics[name].get(THRESHOLD, threshold)
        seed, fingerprints = config.optimizer.seed, self.data.fingerprints
        result = Result(seed, checkpoint.step, metric_of(config), metrics, fingerprints)
        with together(agreement):
            if self.within.is_first:
                for line in remove_parts(directory, but=metrics):
                    self.within.say(line)
                write_result(directory, result)
        return result

    def _measure(
        self, config: TaskRun, trainer: Trainer, name: str, part: TaskPart, threshold: float
    ) -> Mapping[str, float]:
        """Metrics and files of a part, on the first rank."""
        with self.actions.within(Kind.EVALUATION):
            outputs, _ = outputs_of(trainer.pipeline, part.table, self._batches(config, part), trainer.objective)
        metrics: Mapping[str, float] = {}
        with together(self.within.agreement):
            if self.within.is_first:
                found = scored(config, self.data, part, outputs, null_threshold=threshold)
                metrics = found.metrics
                self.within.say("\n".join(write_part(Path(config.run.directory), name, found)))
        return metrics


def _export(verified_checkpoint: Path, out: Path) -> None:
    """Write the directory anew, whatever an earlier start has left; a reader sees a whole one, old or new."""
    fresh, old = (out.with_name(f"{out.name}.{name}") for name in ("new", "old"))
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    to_huggingface(verified_checkpoint, fresh, is_verified=True)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _check_folder(config: TaskRun) -> None:
    """ConfigError where the folder is that of something else: one training, several ones, an evaluation."""
    directory, seeds = Path(config.run.directory), config.run.seeds
    is_training = (directory / CHECKPOINTS).exists() or (directory / RESULT).exists()
    if seeds is not None and is_training:
        raise ConfigError(
            f"run.seeds: run.directory = {directory} holds a training without run.seeds; give another folder, or "
            "leave run.seeds out"
        )
    if seeds is None and seed_folders(directory):
        raise ConfigError(
            f"run.directory = {directory} holds trainings of run.seeds; give another folder, or that of one seed"
        )
    if (directory / EVALUATED).exists() and not is_training:
        raise ConfigError(
            f"run.directory = {directory} holds what `evaluate` has measured, which would be replaced; give "
            "another folder"
        )


def _finished(config: TaskRun, data: TaskData) -> Result | None:
    """What an earlier start with the same settings, weights and data has finished."""
    directory = Path(config.run.directory)
    settings = directory / SETTINGS_FILE
    if not (directory / RESULT).exists() or config.run.resume != "auto":
        return None
    if not settings.exists() or settings.read_text(encoding="utf-8") != to_yaml(config):
        return None
    result = read_result(directory)
    return result if result.fingerprints == data.fingerprints else None
