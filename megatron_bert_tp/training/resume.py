"""Where a run goes on, and what must be as it was."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_bert_tp.checkpoint.directories import latest_checkpoint
from megatron_bert_tp.checkpoint.durable import JSON, sha256_of
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.config.dump import to_dict
from megatron_bert_tp.config.environment import LaunchEnvironment
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.errors import CheckpointError
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.training.failures import together
from megatron_bert_tp.training.numbers import batch_size
from megatron_bert_tp.training.run_directory import CHECKPOINTS, SAMPLES, SETTINGS, tokenizer_name

_LEARNED = ("model", "data", "objective", "optimizer")


def checkpoint_to_resume(
    config: Config, environment: LaunchEnvironment, agreement: Agreement
) -> Checkpoint | None:
    """What ``run.resume`` names, its files verified by the first rank."""
    checkpoint = _named_checkpoint(config)
    if checkpoint is None:
        return None
    _check_tokenizer(checkpoint, config)
    with together(agreement):
        if environment.is_first:
            checkpoint.verify()
    return checkpoint


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


def changed_settings(checkpoint: Checkpoint, config: Config) -> list[str]:
    """What decides the loss curve and differs from the run of the checkpoint, as ``path: old -> new``."""
    stored = checkpoint.facts.get(SETTINGS)
    before = dict(_leaves(stored, "")) if isinstance(stored, Mapping) else {}
    now = dict(_leaves(to_dict(config), ""))
    return [
        f"{path}: {before[path]} -> {value}"
        for path, value in now.items()
        if path.partition(".")[0] in _LEARNED and path in before and before[path] != value
    ]


def _leaves(values: Mapping[str, object] | Mapping[str, JSON], path: str) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _named_checkpoint(config: Config) -> Checkpoint | None:
    """The newest checkpoint of the folder, none, or the one at the path that ``run.resume`` gives."""
    checkpoints = Path(config.run.directory) / CHECKPOINTS
    newest = latest_checkpoint(checkpoints)
    if config.run.resume == "auto":
        return Checkpoint.open(newest) if newest else None
    if newest:
        raise CheckpointError(
            f"run.resume is {config.run.resume}, but {checkpoints} already holds {newest.name}, and the run would "
            "write over what follows; choose another run.directory, or go on from the newest with run.resume=auto"
        )
    return None if config.run.resume == "never" else Checkpoint.open(Path(config.run.resume))


def _check_tokenizer(checkpoint: Checkpoint, config: Config) -> None:
    """CheckpointError when the words have changed under the weights."""
    kept = checkpoint.manifest.files.get(tokenizer_name(config))
    if kept is None or kept.sha256 != sha256_of(Path(config.data.tokenizer)):
        raise CheckpointError(
            f"{config.data.tokenizer}: is not the tokenizer of {checkpoint.directory}, which lies in there; set "
            "data.tokenizer to that one (and data.corpus to a corpus of it), or choose another run.directory"
        )
