"""What the tests of reading share: files made up on the spot, read, and the errors that they give."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_bert_tp.config.task_schema import ColumnsConfig, TaskConfig
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks.reading.parts import Part
from megatron_bert_tp.tasks.reading.read import Reading, read_examples


def task(name: str, *, columns: Mapping[str, object] | None = None, **settings: object) -> TaskConfig:
    return TaskConfig(name=name, columns=ColumnsConfig(**(columns or {})), **settings)


def read(given: str | TaskConfig, *paths: Path, part: Part = "training") -> Reading:
    known = task(given) if isinstance(given, str) else given
    return read_examples(known, paths, part=part)


def refusal(given: str | TaskConfig, *paths: Path, part: Part = "training") -> str:
    """Text of the error that reading gives."""
    with pytest.raises(DataError) as caught:
        read(given, *paths, part=part)
    return str(caught.value)


def write(path: Path, *lines: str, end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}{end}" for line in lines).encode())
    return path
