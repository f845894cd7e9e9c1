from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bert_tp import evaluate, finetune
from megatron_bert_tp.config.command_line import run_command
from megatron_bert_tp.config.task_table import Kind
from tests.finetuning.cases import Files, write_model, write_task
from tests.finetuning.reference import Followed, follow
from tests.finetuning.runs import EVALUATE, FINETUNE

ENTRIES = {FINETUNE: finetune, EVALUATE: evaluate}


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """Hugging Face directory of a pretraining model of two layers, written by `transformers`."""
    return write_model(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def files_of(small_model, tmp_path_factory) -> Callable[[Kind], Files]:
    """Files and settings of the task of a kind, made once."""
    known: dict[Kind, Files] = {}

    def files_of(kind: Kind) -> Files:
        if kind not in known:
            known[kind] = write_task(kind, tmp_path_factory.mktemp(kind.name.lower()), small_model)
        return known[kind]

    return files_of


@pytest.fixture(scope="session")
def followed_of(files_of) -> Callable[[Kind], Followed]:
    """What the loop over `transformers` gives for a kind, computed once."""
    known: dict[Kind, Followed] = {}

    def followed_of(kind: Kind) -> Followed:
        if kind not in known:
            known[kind] = follow(kind, files_of(kind))
        return known[kind]

    return followed_of


@pytest.fixture
def message_of(capfd):
    """What an entry point says on stderr, and the code that it ends with."""

    def message_of(module, settings, *overrides):
        entry = ENTRIES[module]
        code = run_command(entry.main, usage=entry.USAGE, arguments=[str(settings), *map(str, overrides)])
        return code, capfd.readouterr().err

    return message_of
