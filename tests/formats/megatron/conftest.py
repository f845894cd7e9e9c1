import pytest
from transformers.utils import logging

from megatron_bert_tp.formats.megatron import convert
from megatron_bert_tp.formats.megatron.unpickle import extract_all
from tests.formats.megatron.synthetic import Model, build

logging.disable_progress_bar()


@pytest.fixture(scope="session")
def models() -> dict[bool, Model]:
    """Models with and without a binary head."""
    return {binary: build(binary=binary) for binary in (True, False)}


@pytest.fixture
def in_process(monkeypatch) -> None:
    """Unpickles without a child of its own, whose start costs seconds."""

    def unpickle(files, folder):
        extract_all([(file.label, str(file.path)) for file in files], folder)

    monkeypatch.setattr(convert, "unpickle_in_child", unpickle)
