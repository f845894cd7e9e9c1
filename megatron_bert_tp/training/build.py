"""From settings to a trainer: the one place, beside the entry points, that sees the whole `Config`."""

from contextlib import ExitStack
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import torch
from rich.console import Console

from megatron_bert_tp.checkpoint.load import load_parts_, load_rectangles_
from megatron_bert_tp.checkpoint.model import check_model
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.config.environment import LaunchEnvironment
from megatron_bert_tp.config.schema import Config, ModelConfig
from megatron_bert_tp.data.loader import Loading, StepLoader
from megatron_bert_tp.data.tokenizer import Tokenizer
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.formats.tokenizer_files import LIBRARY, VOCABULARY
from megatron_bert_tp.formats.weights import ModelSource, open_weights
from megatron_bert_tp.model.initialisation import initialise_
from megatron_bert_tp.model.shape import ModelShape, tensor_shapes
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.optim.adamw import MOMENTS, AdamWNumbers, build_adamw, moment_of, restart_
from megatron_bert_tp.optim.learning_rate import LinearSchedule
from megatron_bert_tp.parallel.gradients import Gradients
from megatron_bert_tp.parallel.mesh import ParallelMesh
from megatron_bert_tp.pipeline.partition import StagePlan, partition, stage_costs
from megatron_bert_tp.training.failures import telling, together
from megatron_bert_tp.training.processes import (
    barrier,
    build_mesh,
    choose_device,
    keep_freed_memory,
    peak_memory,
    process_group,
)
from megatron_bert_tp.training.progress import MetricsFile, Reporter
from megatron_bert_tp.training.resume import checkpoint_to_resume, samples_at_the_end, samples_done
from megatron_bert_tp.training.run_directory import RunDirectory, prepare
from megatron_bert_tp.training.telling import interruption, opening, reading, say_nothing
from megatron_bert_tp.training.texts import Texts, open_texts
from megatron_bert_tp.training.trainer import Pace, Trainer

METRICS = "metrics.jsonl"


def pretrain(config: Config, environment: LaunchEnvironment) -> None:
    """Run ``config`` on this rank, from the newest checkpoint to the last step."""
    keep_freed_memory()
    device = choose_device(config.run.device, environment.local_rank)
    timeout = timedelta(seconds=config.run.timeout_seconds)
    with ExitStack() as stack:
        stack.enter_context(process_group(environment, device, timeout))
        stack.enter_context(telling(environment))
        mesh = build_mesh(
            environment,
            device,
            tensor=config.parallel.tensor,
            pipeline=config.parallel.pipeline,
            timeout=timeout,
        )
        texts = open_texts(config, mesh.data, say=print if environment.is_first else say_nothing)
        checkpoint = checkpoint_to_resume(config, environment, device)
        trainer = build_trainer(config, mesh, texts, device=device, checkpoint=checkpoint)
        prepare(config, environment, device)
        reporter = stack.enter_context(_reporter(config, trainer.steps_done)) if environment.is_first else None
        directory = RunDirectory(config, environment, mesh=mesh, device=device, reporter=reporter)
        directory.say(opening(config, environment, trainer, checkpoint, plans=stage_plans(config)))
        begun = trainer.samples_done
        try:
            trainer.run(directory)
        except KeyboardInterrupt:
            directory.say(interruption(config, trainer.steps_done))
            raise
        if trainer.samples_done > begun:
            directory.say(reading(texts.source, begun, trainer.samples_done))
        directory.say(f"peak memory of a rank: {peak_memory(mesh, device):.2f} GiB")
        barrier()


def build_trainer(
    config: Config,
    mesh: ParallelMesh,
    texts: Texts,
    *,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
) -> Trainer:
    """Stage, optimizer and gradients of one rank, new, from given weights, or as a checkpoint left them."""
    shape = model_shape(config)
    plan = stage_plans(config)[mesh.pipeline.rank]
    dtype = getattr(torch, config.optimizer.precision)
    with device:  # made there: moving a stage would part the two leaves of a tied weight
        stage = MegatronBertStage(shape, plan, axis=mesh.tensor, seed=config.optimizer.seed, dtype=dtype)
    with together(device):
        _fill_(stage, config, checkpoint, verify=mesh.is_first)
    numbers = AdamWNumbers(
        beta1=config.optimizer.beta1,
        beta2=config.optimizer.beta2,
        epsilon=config.optimizer.epsilon,
        weight_decay=config.optimizer.weight_decay,
    )
    optimizer = build_adamw(stage.trained_parameters(), numbers)
    if checkpoint is not None:
        restart_(optimizer, checkpoint.step)
        for kind in MOMENTS:
            load_rectangles_(stage.trained_parts(), kind, moment_of(optimizer, kind), checkpoint)
    gradients = Gradients(
        stage.parts(),
        list(tensor_shapes(shape)),
        tied=stage.tied(),
        mesh=mesh,
        bucket_bytes=config.parallel.bucket_megabytes << 20,
    )
    steps, samples = (checkpoint.step, samples_done(checkpoint)) if checkpoint else (0, 0)
    end = samples_at_the_end(config, steps_done=steps, samples_done=samples)
    return Trainer(
        stage,
        optimizer,
        gradients,
        texts,
        _steps(config, texts, device, end=end),
        mesh=mesh,
        device=device,
        pace=_pace(config),
        steps_done=steps,
        samples_done=samples,
    )


def _steps(config: Config, texts: Texts, device: torch.device, *, end: int) -> StepLoader:
    loading = Loading(
        num_workers=config.run.data_workers,
        pins_memory=device.type == "cuda",
        timeout_seconds=config.run.timeout_seconds,
    )
    global_batch = config.optimizer.global_batch
    return StepLoader(texts.training.take, global_batch=global_batch, end=end, loading=loading)


def model_shape(config: Config) -> ModelShape:
    """The sizes of the model among the settings."""
    settable = {field.name for field in fields(ModelConfig)}
    names = [field.name for field in fields(ModelShape) if field.name in settable]
    return ModelShape(**{name: getattr(config.model, name) for name in names})


def stage_plans(config: Config) -> tuple[StagePlan, ...]:
    """Which layers each stage holds, the weight of the MLM head at the masked positions considered."""
    model = config.model
    costs = stage_costs(
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        vocab_size=model.vocab_size,
        sequence_length=config.data.sequence_length,
        predicted_share=config.objective.masking.probability,
    )
    return partition(
        model.num_hidden_layers,
        config.parallel.pipeline,
        embedding_cost=costs.embedding,
        head_cost=costs.head,
    )


def _fill_(
    stage: MegatronBertStage, config: Config, checkpoint: Checkpoint | None, *, verify: bool
) -> None:
    """Weights of the checkpoint, else of ``model.weights``, else initial ones from the seed."""
    if checkpoint is not None:
        check_model(checkpoint, stage.shape)
        load_parts_(stage.parts(), checkpoint.weight)
    elif config.model.weights is not None:
        load_parts_(stage.parts(), open_weights(Path(config.model.weights), stage.shape, verify=verify))
        if verify:
            _check_vocabulary(Path(config.model.weights), Path(config.data.tokenizer))
    else:
        initialise_(stage, seed=config.optimizer.seed)


def _check_vocabulary(weights: Path, tokenizer: Path) -> None:
    """DataError when the weights come with another vocabulary than that of the run: a row is the word of an id."""
    files = ModelSource.open(weights).tokenizer_files
    own = next((files[name] for name in (LIBRARY, VOCABULARY) if name in files), None)
    if own is None:
        return
    theirs, ours = (Tokenizer.load(path, True).vocabulary.entries for path in (own, tokenizer))
    if theirs != ours:
        raise DataError(
            f"{tokenizer} has {len(ours)} entries that are not the {len(theirs)} of {own}, with which the weights "
            f"of {weights} were trained; set data.tokenizer={own} and make the corpus with it"
        )


def _pace(config: Config) -> Pace:
    optimizer, run = config.optimizer, config.run
    return Pace(
        steps=optimizer.steps,
        global_batch=optimizer.global_batch,
        clip_norm=optimizer.clip_norm,
        schedule=LinearSchedule(
            peak=optimizer.learning_rate,
            final=optimizer.final_learning_rate,
            warmup=optimizer.warmup_steps,
            steps=optimizer.steps,
        ),
        pipeline_schedule=config.parallel.schedule,
        save_every=run.save_every,
        evaluate_every=run.evaluate_every,
        evaluation_samples=run.evaluation_samples,
    )


def _reporter(config: Config, steps_done: int) -> Reporter:
    metrics = MetricsFile(Path(config.run.directory) / METRICS, steps_done=steps_done)
    steps = config.optimizer.steps
    return Reporter(
        metrics,
        Console(),
        steps=steps,
        steps_done=steps_done,
        log_every=config.run.log_every,
        pairs=config.objective.pairs,
    )
