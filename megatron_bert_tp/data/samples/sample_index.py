"""A folder that holds the spans of one part of a corpus: an .npy file for each array, and facts.json.

facts.json says what the spans were made from, how long the arrays are, and size and SHA-256 of their files.  A
folder that does not fit its facts, or whose facts are not those that are asked for, is refused.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.format import write_array_header_1_0

from megatron_bert_tp.data.samples.spans import SPAN_COLUMNS, Spans, map_spans

FACTS = "facts.json"
_LARGEST_FACTS = 1 << 20  # bytes

MadeFrom = Mapping[str, Any]
"""What spans depend on, in types that JSON knows."""


class UnusableIndexError(Exception):
    """Why a folder of spans is not used; whoever asks builds it anew."""


def key_of(made_from: MadeFrom) -> str:
    """Name that no other ``made_from`` has."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]


def write_index(
    folder: Path, blocks: Iterable[Spans], *, types: Mapping[str, np.dtype[Any]], made_from: MadeFrom
) -> int:
    """Fill an empty folder with the spans of ``blocks``, facts.json last; returns how many there are."""
    with ExitStack() as stack:
        opened = {name: _ArrayFile(folder / f"{name}.npy", types[name]) for name in SPAN_COLUMNS}
        columns = {name: stack.enter_context(file) for name, file in opened.items()}
        for block in blocks:
            for name, column in columns.items():
                column.append(getattr(block, name))
    counts = {name: column.length for name, column in columns.items()}
    facts = {"made_from": made_from, "lengths": counts, "files": _files(folder)}
    with (folder / FACTS).open("x", encoding="utf-8") as file:
        file.write(json.dumps(facts, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return counts["first"]


def read_index(folder: Path, made_from: MadeFrom) -> Spans:
    """The spans of a folder, once every file is known to have its SHA-256; else UnusableIndexError."""
    try:
        facts = _read_facts(folder / FACTS)
        if facts["made_from"] != made_from:
            raise UnusableIndexError("it was made from another corpus or with other settings")
        _compare("files", facts["files"], _files(folder))
        spans = map_spans(folder)
        _compare("lengths", facts["lengths"], {name: len(getattr(spans, name)) for name in SPAN_COLUMNS})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnusableIndexError(f"{type(error).__name__}: {error}") from error
    return spans


def _compare(what: str, said: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """UnusableIndexError that names what is found to be other than it is said to be."""
    wrong = [name for name in found if found[name] != said.get(name)]
    if wrong:
        told = "; ".join(f"{name} has {found[name]}, not {said.get(name)}" for name in wrong)
        raise UnusableIndexError(f"{what}: {told}")


def _read_facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        facts = json.loads(file.read(_LARGEST_FACTS))
    if not isinstance(facts, dict):
        raise UnusableIndexError(f"{FACTS} holds no facts")
    return facts


def _files(folder: Path) -> dict[str, dict[str, int | str]]:
    """Size and SHA-256 of the file of each array."""
    paths = [folder / f"{name}.npy" for name in SPAN_COLUMNS]
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256_of_file(path)} for path in paths}


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _ArrayFile:
    """An .npy file of one dimension that grows; its header is right once it is closed."""

    def __init__(self, path: Path, dtype: np.dtype[Any]):
        self.length = 0
        self._dtype = dtype
        self._file = path.open("xb")

    def __enter__(self) -> "_ArrayFile":
        self._write_header()
        return self

    def append(self, numbers: npt.NDArray[Any]) -> None:
        """Add numbers of the file's own type."""
        assert numbers.dtype == self._dtype
        self._file.write(np.ascontiguousarray(numbers).data)
        self.length += len(numbers)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()
            self._file.flush()
            os.fsync(self._file.fileno())

    def _write_header(self) -> None:
        # numpy leaves room in the header for any length, so that it can be written again in its place.
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.length,)}
        write_array_header_1_0(self._file, header)
