"""Where a run goes on, and what must be as it was."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_bert_tp.checkpoint.choose import newest_whole, verified
from megatron_bert_tp.checkpoint.directories import candidates, latest_checkpoint
from megatron_bert_tp.checkpoint.durable import sha256_of
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.config.schema import OptimizerConfig, RunConfig
from megatron_bert_tp.errors import CheckpointError
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.training.changes import check_changes
from megatron_bert_tp.training.failures import together
from megatron_bert_tp.training.numbers import batch_size
from megatron_bert_tp.training.recipe import Recipe
from megatron_bert_tp.training.run_directory import CHECKPOINTS, SAMPLES


@dataclass(frozen=True)
class Beginning:
    """Where a run begins: at a checkpoint whose files are verified, or at step 0 (None)."""

    checkpoint: Checkpoint | None
    skipped: tuple[str, ...] = ()
    """Newer checkpoints that are damaged, and why."""
    changes: tuple[str, ...] = ()
    """Settings that decide the loss curve and are not those of the checkpoint."""


def beginning(
    recipe: Recipe,
    agreement: Agreement,
    *,
    is_restart: bool = False,
    say: Callable[[str], None] = lambda _name: None,
) -> Beginning:
    """What ``run.resume`` names; every rank must call it.

    A launcher or a cluster that starts the same command anew (``is_restart``) goes on from what that has saved.
    CheckpointError where a checkpoint is damaged or does not fit; ConfigError where settings have changed that
    decide the loss curve.  ``say`` hears what is read.
    """
    begin = _named(recipe.run, agreement, is_restart=is_restart, say=say)
    if begin.checkpoint is None:
        return begin
    with together(agreement):
        _check_tokenizer(begin.checkpoint, recipe)
        changes = check_changes(begin.checkpoint, recipe.given, recipe.fingerprints, recipe.start)
    return Beginning(begin.checkpoint, begin.skipped, tuple(changes))


def samples_done(checkpoint: Checkpoint) -> int:
    """Samples that the run of ``checkpoint`` has consumed."""
    samples = checkpoint.facts.get(SAMPLES)
    if not isinstance(samples, int):
        raise CheckpointError(
            f"{checkpoint.directory}: does not say how many samples its run has consumed, so no run can go on; "
            "start a new run from its weights with model.weights="
        )
    return samples


def samples_at_the_end(optimizer: OptimizerConfig, *, steps_done: int, samples_done: int) -> int:
    """Samples that the run will have consumed; its first steps may have had another global batch."""
    left = max(0, optimizer.steps - steps_done)
    return batch_size(optimizer).samples_after(left, samples_done=samples_done)


def _named(
    run: RunConfig, agreement: Agreement, *, is_restart: bool, say: Callable[[str], None]
) -> Beginning:
    """The newest whole checkpoint of the folder, none, or the one at the path that ``run.resume`` gives."""
    checkpoints = Path(run.directory) / CHECKPOINTS
    with together(agreement):
        found = bool(candidates(checkpoints))
    has_checkpoints = bool(agreement.maximum([found])[0])
    if run.resume == "auto" or (is_restart and has_checkpoints):
        choice = newest_whole(checkpoints, agreement, begin=say)
        if choice.checkpoint is None and has_checkpoints:
            raise CheckpointError(
                "\n  ".join([f"{checkpoints}: no checkpoint in it is whole:", *choice.skipped])
                + "\nbring one back from a copy, or choose another run.directory to begin anew"
            )
        return Beginning(choice.checkpoint, choice.skipped)
    with together(agreement):
        if newest := latest_checkpoint(checkpoints):
            raise CheckpointError(
                f"run.resume is {run.resume}, but {checkpoints} already holds {newest.name}, and the run "
                "would write over what follows; choose another run.directory, or go on from the newest with "
                "run.resume=auto"
            )
    if run.resume == "never":
        return Beginning(None)
    say(run.resume)
    return Beginning(verified(Path(run.resume), agreement))


def _check_tokenizer(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """CheckpointError when the words have changed under the weights."""
    for name, path in recipe.tokenizer_files.items():
        kept = checkpoint.manifest.files.get(name)
        if kept is None or kept.sha256 != sha256_of(path):
            raise CheckpointError(
                f"{path}: is not the tokenizer of {checkpoint.directory}, which lies in there; go on with that "
                "one (data.tokenizer, and a corpus of it), or choose another run.directory"
            )
