"""What a run says of itself at its start and at its end."""

from collections.abc import Sequence

from megatron_bert_tp.config.environment import LaunchEnvironment
from megatron_bert_tp.config.schema import ParallelConfig
from megatron_bert_tp.data.samples.source import SampleSource
from megatron_bert_tp.parallel.mesh import ParallelMesh
from megatron_bert_tp.training.recipe import Recipe
from megatron_bert_tp.training.resume import Beginning
from megatron_bert_tp.training.trainer import Trainer


def opening(
    recipe: Recipe,
    environment: LaunchEnvironment,
    trainer: Trainer,
    begin: Beginning,
    *,
    reads: Sequence[str],
) -> str:
    """Layout, what is read, in lines of its own, and where the run begins."""
    parallel, mesh = recipe.parallel, trainer.mesh
    extras = _switched_on(recipe, mesh)
    layers = ", ".join(str(len(plan.layers)) for plan in recipe.plans)
    processes = f"{environment.world_size} process{'es' if environment.world_size > 1 else ''}"
    return "\n".join(
        [
            f"{processes}: data {mesh.data.size} x pipeline {parallel.pipeline} x tensor {parallel.tensor}; "
            f"{_device(trainer)}, {recipe.optimizer.precision}, {_schedule(parallel)}, layers {layers}",
            *([f"with {', '.join(extras)}"] if extras else []),
            *_without_effect(recipe, mesh),
            *reads,
            *_beginning(recipe, trainer.steps_done, begin),
        ]
    )


def reading(source: SampleSource, begun: int, done: int) -> str:
    """What was read of each corpus between two numbers of samples."""
    rows = zip(source.epochs(begun), source.epochs(done), strict=True)
    return "read: " + ", ".join(
        f"{after.samples - before.samples:,} samples ({after.epochs - before.epochs:.3g} epochs) of {after.prefix}"
        for before, after in rows
    )


def _schedule(parallel: ParallelConfig) -> str:
    """Name or file of the schedule, and the stages of a rank where they are several."""
    name = parallel.schedule if parallel.schedule_file is None else f"schedule of {parallel.schedule_file}"
    return name if parallel.virtual == 1 else f"{name} with {parallel.virtual} stages a rank"


def _switched_on(recipe: Recipe, mesh: ParallelMesh) -> list[str]:
    """What is not on unless it is asked for."""
    parallel = recipe.parallel
    where = "" if parallel.recompute_every == 1 else f" in 1 layer of {parallel.recompute_every}"
    choices = {
        recipe.optimizer.name: recipe.optimizer.name != "adamw",
        "sequence parallelism": parallel.sequence and mesh.tensor.size > 1,
        "sharded optimizer": parallel.shard_optimizer and mesh.data.size > 1,
        "overlapped messages": parallel.overlap_messages and mesh.pipeline.size > 1,
        f"{parallel.recompute} recomputation{where}": parallel.recompute != "none",
        f"packing {parallel.packing}": parallel.packing != "none",
        "kernels of apex": recipe.run.fused == "apex",
    }
    return [name for name, is_on in choices.items() if is_on]


def _without_effect(recipe: Recipe, mesh: ParallelMesh) -> list[str]:
    """Settings that this layout leaves nothing to do; another one may, so they are no error."""
    parallel = recipe.parallel
    asked = {
        "parallel.sequence (tensor size 1)": parallel.sequence and mesh.tensor.size == 1,
        "parallel.shard_optimizer (data size 1)": parallel.shard_optimizer and mesh.data.size == 1,
        "parallel.overlap_messages (pipeline size 1)": parallel.overlap_messages and mesh.pipeline.size == 1,
    }
    idle = [name for name, is_asked in asked.items() if is_asked]
    return [f"without effect here: {', '.join(idle)}"] if idle else []


def _device(trainer: Trainer) -> str:
    """Kind of the device, and on a GPU who draws the bits of dropout."""
    if trainer.device.type != "cuda":
        return trainer.device.type
    by_host = "dropout bits from the host: no kernel for this precision, or triton cannot be imported"
    return f"cuda ({'Triton kernels' if trainer.chunks[0].kernels == 'triton' else by_host})"


def corpora(source: SampleSource, num_samples: int) -> list[str]:
    """Samples an epoch of each corpus, and what the whole run takes of it."""
    return [
        f"{row.samples_per_epoch:,} samples an epoch from {row.prefix}; {row.samples:,} in the whole run, "
        f"{row.epochs:.3g} epochs"
        for row in source.epochs(num_samples)
    ]


def _beginning(recipe: Recipe, steps_done: int, begin: Beginning) -> list[str]:
    passed = [f"checkpoint passed over: {reason}" for reason in begin.skipped]
    if begin.checkpoint is None:
        weights = f" from the weights of {recipe.weights}" if recipe.weights else ""
        return [*passed, f"starts at step 0{weights}"]
    lines = [*passed, f"goes on from {begin.checkpoint.directory}, step {begin.checkpoint.step}"]
    lines += [f"changed since then: {change}" for change in begin.changes]
    if steps_done >= recipe.optimizer.steps:
        lines.append(f"already finished: optimizer.steps is {recipe.optimizer.steps}")
    return lines
