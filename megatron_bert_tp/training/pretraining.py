"""A pretraining run on one rank, from its start to its end, whatever ends it."""

from megatron_bert_tp.config.environment import LaunchEnvironment
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.reliability.actions import Kind
from megatron_bert_tp.training.build import build_pretrainer
from megatron_bert_tp.training.course import Course
from megatron_bert_tp.training.evaluation import HeldOut
from megatron_bert_tp.training.progress import PretrainingLines
from megatron_bert_tp.training.recipe import pretraining_recipe
from megatron_bert_tp.training.resume import beginning, samples_at_the_end
from megatron_bert_tp.training.session import Session, session
from megatron_bert_tp.training.telling import corpora, reading
from megatron_bert_tp.training.texts import open_texts


def pretrain(config: Config, environment: LaunchEnvironment) -> None:
    """Run ``config`` on this rank, from the newest checkpoint to the last step.

    What ends the run early is told and written to `exit.json` before it is raised (`training.failures`).
    StoppedError when it was asked to stop, with all steps saved; with ``run.requeue`` SLURM runs the job again.
    """
    cache = config.run.index_cache
    with session(config.run, environment, folders=() if cache is None else (cache,)) as within:
        _run(config, within)


def _run(config: Config, within: Session) -> None:
    """Build what trains, train, and tell how it ended."""
    mesh, actions = within.meet(config.parallel)
    actions.enter(Kind.STARTING, "opens the corpora")
    texts = open_texts(config, mesh.data, say=within.narrator(actions))
    recipe = pretraining_recipe(config, tuple(texts.fingerprints))
    begin = beginning(
        recipe,
        within.agreement,
        is_restart=within.environment.restarts > 0,
        say=lambda name: actions.enter(Kind.STARTING, f"verifies {name}"),
    )
    actions.enter(Kind.STARTING, "builds the model")
    trainer = build_pretrainer(
        config,
        mesh,
        texts,
        agreement=within.agreement,
        device=within.device,
        checkpoint=begin.checkpoint,
        actions=actions,
    )
    optimizer, run = config.optimizer, config.run
    end = samples_at_the_end(optimizer, steps_done=trainer.steps_done, samples_done=trainer.samples_done)
    evaluation = HeldOut(
        texts, num_samples=run.evaluation_samples, every=run.evaluate_every, last_step=optimizer.steps
    )
    Course(
        recipe=recipe,
        trainer=trainer,
        begin=begin,
        evaluation=evaluation,
        lines=PretrainingLines(config.objective.pairs, shows_scale=optimizer.precision == "float16"),
        reads=corpora(texts.source, end),
        reading=lambda begun, done: reading(texts.source, begun, done),
    ).run(within, actions)
    within.tell_end(actions)
