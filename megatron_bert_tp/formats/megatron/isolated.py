"""Unpickling in a process of its own, of which only safetensors and JSON come back."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_bert_tp.checkpoint.durable import JSON, read_object
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.stored_tensors import StoredTensor, open_tensors

_MODULE = "megatron_bert_tp.formats.megatron.unpickle"
_JOBS, _REFUSED = "jobs.json", 3  # as the module says, which is not imported here: it is for the child
_LARGEST_FACTS = 16 * 2**20  # bytes
_START_SECONDS, _BYTES_PER_SECOND = 120, 5 * 10**6  # a slow machine and a slow disk

Unpickle = Callable[[Sequence["PickledFile"], Path], None]


@dataclass(frozen=True)
class PickledFile:
    """A file of `torch.save`; ``label`` is what messages call it."""

    label: str
    path: Path


@dataclass(frozen=True)
class RankContent:
    """What a file held: its tensors under ``CHUNK:dotted.name``, the plain ones of its arguments, its version."""

    label: str
    tensors: Mapping[str, StoredTensor]
    arguments: Mapping[str, JSON]
    version: float


def unpickle_in_child(files: Sequence[PickledFile], folder: Path) -> None:
    """Turn every file into ``N.safetensors`` and ``N.json`` in ``folder``, by one child for all.

    FormatError when a file is refused, and when the child fails, is killed, or takes too long.
    """
    jobs = [(file.label, str(file.path.absolute())) for file in files]
    (folder / _JOBS).write_text(json.dumps(jobs), encoding="utf-8")
    seconds = _START_SECONDS + sum(file.path.stat().st_size for file in files) / _BYTES_PER_SECOND
    command = [sys.executable, "-m", _MODULE, str(folder.absolute())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise FormatError(f"{files[0].label}: was not unpickled within {seconds:.0f} seconds; given up") from error
    if done.returncode == _REFUSED:
        raise FormatError(done.stdout.strip())
    if done.returncode:
        raise FormatError(f"{files[0].label}: the process that unpickles it {_ending(done)}")


def _ending(done: "subprocess.CompletedProcess[str]") -> str:
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"was killed by {name}; it may have needed more memory than there is"
    last = done.stderr.strip().rpartition("\n")[2]
    return f"ended with code {done.returncode}: {last[:300]}"


def open_content(number: int, file: PickledFile, folder: Path) -> RankContent:
    """What `unpickle_in_child` left of file ``number``."""
    facts = read_object(folder / f"{number}.json", largest=_LARGEST_FACTS, error=FormatError)
    arguments, version = facts["arguments"], facts["version"]
    assert isinstance(arguments, dict)
    assert isinstance(version, float)
    return RankContent(file.label, open_tensors([folder / f"{number}.safetensors"]), arguments, version)
