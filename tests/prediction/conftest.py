"""Vocabularies and directories of models that several tests share."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

from tests.prediction.directories import make_directory
from tests.prediction.texts import VOCABULARIES

REAL = Path(__file__).parents[2] / ".." / "shared" / "data" / "vocab"
REAL_NAMES = {"bert uncased": "bert-large-uncased-vocab.txt", "bert cased": "bert-large-cased-vocab.txt"}

logging.disable_progress_bar()
logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def no_network(monkeypatch) -> None:
    """Whatever asks the network fails: all files are local."""

    def refuse(_socket: socket.socket, address: object) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def vocabulary_file(tmp_path_factory) -> Callable[[str], Path]:
    """Function that gives a ``vocab.txt``: a small one, or, where it is on this machine, one of BERT."""
    folder = tmp_path_factory.mktemp("vocabularies")

    def find(name: str) -> Path:
        if name in VOCABULARIES:
            path = folder / f"{name}.txt"
            path.write_text("".join(f"{entry}\n" for entry in VOCABULARIES[name]), encoding="utf-8")
            return path
        path = REAL / REAL_NAMES[name]
        if not path.exists():
            pytest.skip(f"real vocabulary ../shared/data/vocab/{REAL_NAMES[name]} is not on this machine")
        return path

    return find


@pytest.fixture(scope="session")
def directory_of(tmp_path_factory, vocabulary_file) -> Callable[..., Path]:
    """Function that gives the directory of a model of some class and vocabulary, made once a session."""
    made: dict[str, Path] = {}

    def find(architecture: str, vocabulary: str = "uncased", **settings: Any) -> Path:
        key = repr((architecture, vocabulary, settings))
        if key not in made:
            lowercase = "uncased" in vocabulary
            folder = tmp_path_factory.mktemp("model") / "model"
            made[key] = make_directory(
                folder, architecture, vocabulary_file(vocabulary), lowercase=lowercase, **settings
            )
        return made[key]

    return find
