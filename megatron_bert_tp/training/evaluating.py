"""Measuring a model that has learned a task, on one rank."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from megatron_bert_tp.config.environment import LaunchEnvironment
from megatron_bert_tp.config.task_schema import TaskRun
from megatron_bert_tp.errors import ConfigError
from megatron_bert_tp.formats.task_folder import RESULT, seed_folders
from megatron_bert_tp.reliability.actions import Kind
from megatron_bert_tp.training.build import build_pipeline
from megatron_bert_tp.training.failures import together
from megatron_bert_tp.training.outputs import outputs_of
from megatron_bert_tp.training.run_directory import CHECKPOINTS
from megatron_bert_tp.training.session import session
from megatron_bert_tp.training.state import weights_source
from megatron_bert_tp.training.task_data import batches_of, open_task_data
from megatron_bert_tp.training.task_evaluation import THRESHOLD, scored
from megatron_bert_tp.training.task_recipe import task_objective, task_recipe
from megatron_bert_tp.training.task_results import remove_parts, write_metrics, write_part


def evaluate(config: TaskRun, environment: LaunchEnvironment) -> None:
    """Measure ``model.weights`` on validation, and predict test; files go to ``run.directory``.

    ConfigError where that is the folder of a training, whose own results would be lost.
    """
    _check_free(Path(config.run.directory))
    config = replace(config, model=replace(config.model, random_weights=False))  # that is how a training began
    with session(config.run, environment) as within:
        mesh, actions = within.meet(config.parallel)
        data = open_task_data(config, verifies=mesh.is_first, learns=False, say=within.narrator(actions))
        recipe = task_recipe(config, data)
        actions.enter(Kind.STARTING, "builds the model")
        pipeline = build_pipeline(recipe, mesh, device=within.device, actions=actions)
        with together(within.agreement):
            fill = weights_source(recipe, None, checks=mesh.is_first)
            fill((part, part.view(part.parameter)) for part in pipeline.chunks.parts())
        objective = task_objective(config, recipe, data, mesh.tensor)
        if config.task.balanced:
            within.say(
                "the loss is not balanced: task.balanced counts the classes of data.train, which is not read here"
            )
        metrics: dict[str, Mapping[str, float]] = {}
        threshold = 0.0
        for name, part in (("validation", data.validation), ("test", data.test)):
            if part is None:
                continue
            within.stop_if_asked(f"before the predictions of {name}", kept="the same command measures anew")
            batches = batches_of(part, config, data.source, mesh.data, seed=0)
            with actions.within(Kind.EVALUATION):
                outputs, losses = outputs_of(pipeline, part.table, batches, objective)
            with together(within.agreement):
                if within.is_first:
                    found = scored(config, data, part, outputs, null_threshold=threshold)
                    metrics[name] = {**({} if losses is None else {"loss": losses.loss}), **found.metrics}
                    threshold = found.metrics.get(THRESHOLD, threshold)
                    within.say("\n".join(write_part(Path(config.run.directory), name, found)))
        with together(within.agreement):
            if within.is_first:
                directory = Path(config.run.directory)
                for line in remove_parts(directory, but=metrics):
                    within.say(line)
                write_metrics(directory, metrics)
        within.tell_end(actions)


def _check_free(directory: Path) -> None:
    if (directory / CHECKPOINTS).exists() or (directory / RESULT).exists() or seed_folders(directory):
        raise ConfigError(
            f"run.directory = {directory} holds a training, whose predictions and metrics would be replaced; give "
            "another folder, such as run.directory=runs/evaluation"
        )
