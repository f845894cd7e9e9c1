"""Where a run goes on, and what must be as it was."""

from dataclasses import dataclass
from pathlib import Path

from megatron_bert_tp.checkpoint.choose import newest_whole, verified
from megatron_bert_tp.checkpoint.directories import candidates, find_checkpoint, latest_checkpoint
from megatron_bert_tp.checkpoint.durable import sha256_of
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.errors import CheckpointError
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.training.changes import check_changes
from megatron_bert_tp.training.failures import together
from megatron_bert_tp.training.numbers import batch_size
from megatron_bert_tp.training.run_directory import CHECKPOINTS, SAMPLES, tokenizer_name


@dataclass(frozen=True)
class Beginning:
    """Where a run begins: at a checkpoint whose files are verified, or at step 0 (None)."""

    checkpoint: Checkpoint | None
    skipped: tuple[str, ...] = ()
    """Newer checkpoints that are damaged, and why."""
    changes: tuple[str, ...] = ()
    """Settings that decide the loss curve and are not those of the checkpoint."""


def beginning(config: Config, agreement: Agreement, fingerprints: list[str]) -> Beginning:
    """What ``run.resume`` names; every rank must call it.

    CheckpointError where it is damaged or does not fit; ConfigError where settings have changed that decide the
    loss curve.  ``fingerprints`` are those of the corpora.
    """
    begin = _named(config, agreement)
    if begin.checkpoint is None:
        return begin
    with together(agreement):
        _check_tokenizer(begin.checkpoint, config)
        changes = check_changes(begin.checkpoint, config, fingerprints)
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


def samples_at_the_end(config: Config, *, steps_done: int, samples_done: int) -> int:
    """Samples that the run will have consumed; its first steps may have had another global batch."""
    left = max(0, config.optimizer.steps - steps_done)
    return batch_size(config.optimizer).samples_after(left, samples_done=samples_done)


def _named(config: Config, agreement: Agreement) -> Beginning:
    """The newest whole checkpoint of the folder, none, or the one at the path that ``run.resume`` gives."""
    checkpoints = Path(config.run.directory) / CHECKPOINTS
    if config.run.resume == "auto":
        choice = newest_whole(checkpoints, agreement)
        with together(agreement):
            is_lost = choice.checkpoint is None and bool(candidates(checkpoints))
        if is_lost:
            raise CheckpointError(
                "\n  ".join([f"{checkpoints}: no checkpoint in it is whole:", *choice.skipped])
                + "\nbring one back from a copy, or choose another run.directory to begin anew"
            )
        return Beginning(choice.checkpoint, choice.skipped)
    with together(agreement):
        if newest := latest_checkpoint(checkpoints):
            raise CheckpointError(
                f"run.resume is {config.run.resume}, but {checkpoints} already holds {newest.name}, and the run "
                "would write over what follows; choose another run.directory, or go on from the newest with "
                "run.resume=auto"
            )
    if config.run.resume == "never":
        return Beginning(None)
    with together(agreement):
        path = find_checkpoint(Path(config.run.resume))
    return Beginning(verified(path, agreement))


def _check_tokenizer(checkpoint: Checkpoint, config: Config) -> None:
    """CheckpointError when the words have changed under the weights."""
    kept = checkpoint.manifest.files.get(tokenizer_name(config))
    if kept is None or kept.sha256 != sha256_of(Path(config.data.tokenizer)):
        raise CheckpointError(
            f"{config.data.tokenizer}: is not the tokenizer of {checkpoint.directory}, which lies in there; set "
            "data.tokenizer to that one (and data.corpus to a corpus of it), or choose another run.directory"
        )
