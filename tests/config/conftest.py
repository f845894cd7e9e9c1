"""Valid settings files as tables of YAML texts, so that a test can change one of them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from megatron_bert_tp.config.load import load_config, load_task
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.config.task_schema import TaskRun
from megatron_bert_tp.errors import ConfigError

VALID = {
    "model.vocab_size": "1003",
    "model.hidden_size": "48",
    "model.num_hidden_layers": "5",
    "model.num_attention_heads": "4",
    "model.intermediate_size": "96",
    "model.max_position_embeddings": "64",
    "data.corpus": "corpus",
    "data.tokenizer": "vocab.txt",
    "data.sequence_length": "64",
    "optimizer.global_batch": "64",
    "optimizer.steps": "100",
    "parallel.tensor": "2",
    "parallel.pipeline": "2",
    "parallel.microbatch": "8",
    "run.directory": "runs/test",
}
VALID_TASK = {
    "model.weights": "models/small",
    "task.name": "sst-2",
    "data.train": "train.tsv",
    "data.validation": "dev.tsv",
    "optimizer.global_batch": "64",
    "parallel.tensor": "2",
    "parallel.pipeline": "2",
    "parallel.microbatch": "8",
    "run.directory": "runs/test",
}


def rendered(settings: Mapping[str, str]) -> str:
    """YAML text with one section per first name; deeper names in flow style."""
    lines: list[str] = []
    for section in dict.fromkeys(path.partition(".")[0] for path in settings):
        lines.append(f"{section}:")
        for path, text in settings.items():
            first, _, rest = path.partition(".")
            if first == section:
                outer, _, inner = rest.partition(".")
                lines.append(f"  {outer}: {{{inner}: {text}}}" if inner else f"  {outer}: {text}")
    return "\n".join(lines) + "\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Write a text as the settings file of the test."""

    def _write(text: str) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


@pytest.fixture
def load(write: Callable[[str], Path]) -> Callable[..., Config]:
    """Load the valid settings with some changed; a text of None removes the setting."""

    def _load(
        changes: Mapping[str, str | None] | None = None, *overrides: str, world: int | None = None
    ) -> Config:
        table = {**VALID, **(changes or {})}
        text = rendered({path: text for path, text in table.items() if text is not None})
        return load_config(write(text), overrides, world_size=world)

    return _load


@pytest.fixture
def complaint(load: Callable[..., Config]) -> Callable[..., str]:
    """Message that `load` fails with."""

    def _complaint(
        changes: Mapping[str, str | None] | None = None, *overrides: str, world: int | None = None
    ) -> str:
        with pytest.raises(ConfigError) as caught:
            load(changes, *overrides, world=world)
        return str(caught.value)

    return _complaint


@pytest.fixture
def load_a_task(write: Callable[[str], Path]) -> Callable[..., TaskRun]:
    """`load` for the settings of a task; ``purpose`` is that of `load_task`."""

    def _load(changes: Mapping[str, str | None] | None = None, *overrides: str, **more: object) -> TaskRun:
        table = {**VALID_TASK, **(changes or {})}
        text = rendered({path: text for path, text in table.items() if text is not None})
        return load_task(write(text), overrides, **more)

    return _load


@pytest.fixture
def task_complaint(load_a_task: Callable[..., TaskRun]) -> Callable[..., str]:
    """Message that `load_a_task` fails with."""

    def _complaint(changes: Mapping[str, str | None] | None = None, *overrides: str, **more: object) -> str:
        with pytest.raises(ConfigError) as caught:
            load_a_task(changes, *overrides, **more)
        return str(caught.value)

    return _complaint
