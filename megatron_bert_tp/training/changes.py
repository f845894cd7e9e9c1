"""Settings that decide the loss curve, and which of them are not those of a checkpoint."""

from collections.abc import Iterator, Mapping, Sequence

from megatron_bert_tp.checkpoint.durable import JSON
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.config.dump import Settings, flat
from megatron_bert_tp.config.schema import OptimizerConfig
from megatron_bert_tp.config.settings import all_settings
from megatron_bert_tp.errors import ConfigError

SETTINGS, CORPORA, START = "settings", "corpora", "start"
"""Facts of a checkpoint: all settings of its run, and what tells its corpora and first weights from others."""
_LEARNED = ("model", "task", "data", "objective", "optimizer")
# Where the same content lies does not matter (it is compared by content), nor what step 0 started from.
_FREE = {"data.corpus", "data.tokenizer", "model.weights", "data.train", "data.validation", "data.test"}
_TEXTS = ("data.corpus", "data.train")
"""What is read to learn from: the one of the two that the settings have."""
_ENDLESS = ("constant", "inverse_square_root")


def check_changes(
    checkpoint: Checkpoint, config: Settings, corpora: Sequence[str], start: str | None = None
) -> list[str]:
    """What decides the loss curve and differs from the run of the checkpoint, as ``path: old -> new``.

    ``corpora`` are fingerprints of the corpora, as in the fact `CORPORA`, ``start`` that of the weights at step 0
    where it matters.  ConfigError where anything differs, unless `run.allow_changes`.
    """
    changes = changed_settings(checkpoint.facts, config, corpora)
    if start is not None and checkpoint.facts.get(START) != start:
        changes.append(f"model.weights: {config.model.weights} holds another model than that of the beginning")
    if not changes or config.run.allow_changes:
        return changes
    listed = "\n".join(f"  {change}" for change in changes)
    raise ConfigError(
        f"settings that decide the loss curve are not those of {checkpoint.directory}:\n{listed}\n"
        "put them back, or go on with the new ones with run.allow_changes=true"
    )


def changed_settings(facts: Mapping[str, JSON], config: Settings, corpora: Sequence[str]) -> list[str]:
    """Each difference in a line; a setting that was not there at the time had its default."""
    stored = facts.get(SETTINGS)
    if not isinstance(stored, Mapping):
        return []
    before, values = dict(_leaves(stored, "")), flat(config)
    endless = isinstance(config.optimizer, OptimizerConfig) and _is_endless(config.optimizer)
    free = _FREE | ({"optimizer.steps"} if endless else set())
    changes = []
    for path, value in values.items():
        now = list(value) if isinstance(value, tuple) else value
        if path.partition(".")[0] not in _LEARNED or path in free:
            continue
        old = before.get(path, _default(path, config))
        if old != now:
            changes.append(f"{path}: {old} -> {now}")
    texts = next(path for path in _TEXTS if path in values)
    return changes + _changed_texts(texts, facts.get(CORPORA), before.get(texts), values[texts], corpora)


def _changed_texts(
    path: str, stored: JSON, old: object, given: object, corpora: Sequence[str]
) -> list[str]:
    """Another text; an older checkpoint knows nothing but the names."""
    new = list(given) if isinstance(given, tuple) else given
    is_same = old == new if stored is None else stored == list(corpora)
    if is_same:
        return []
    return [f"{path}: {old} -> {new}" if old != new else f"{path}: {new} gives other samples now"]


def _is_endless(optimizer: OptimizerConfig) -> bool:
    """Whether a longer run begins with the same steps."""
    decay = optimizer.decay_steps if optimizer.schedule_unit == "steps" else optimizer.decay_samples
    has_end = optimizer.schedule == "wsd" or (optimizer.schedule not in _ENDLESS and decay is None)
    return not has_end and optimizer.weight_decay_ramp == "constant"


def _default(path: str, config: Settings) -> object:
    root: type = type(config)
    default = all_settings(root)[path].default
    return list(default) if isinstance(default, tuple) else default


def _leaves(values: Mapping[str, JSON], path: str) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
