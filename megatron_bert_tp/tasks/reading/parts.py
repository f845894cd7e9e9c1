"""A file or folder of a part as its reader gets it, and what the reader gives beside examples."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_bert_tp.errors import DataError

Part = Literal["training", "validation", "test"]
_MNLI_PARTS = ("mismatched", "matched")  # the longer first: both are the end of "dev_mismatched"


@dataclass(frozen=True)
class Note:
    """One line about what was passed over or mended in a file, with counts."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """One of the paths of a part.

    ``part`` is what the examples are for, ``group`` is for them.  ``id_prefix`` stands before ids that are only
    unique within the file, such as the number of a row.
    """

    path: Path
    part: Part
    group: str = ""
    id_prefix: str = ""

    @property
    def is_labelled(self) -> bool:
        """Whether a missing label is an error."""
        return self.part != "test"


def sources_of(task_name: str, paths: Sequence[Path], *, part: Part) -> tuple[Source, ...]:
    """A source for each path; their groups are the names of the files where there are several.

    A file of MNLI whose name ends in ``matched`` or ``mismatched`` has this as its group even alone, because
    submissions need it.  DataError when a path is missing or given twice.
    """
    _check(paths)
    names = _names(paths)
    if task_name == "mnli":
        names = _mnli_names(names)
    elif len(paths) == 1:
        names = ("",)
    prefixes = [f"{name}:" if len(paths) > 1 else "" for name in names]
    return tuple(
        Source(path=path, part=part, group=name, id_prefix=prefix)
        for path, name, prefix in zip(paths, names, prefixes, strict=True)
    )


def no_examples(path: Path, notes: Sequence[Note]) -> DataError:
    """The error that a file has no example, with what was passed over in it."""
    why = "".join(f"; {note.text}" for note in notes)
    return DataError(f"{path}: has no example of the task{why}; give a file with some, and check task.name")


def _check(paths: Sequence[Path]) -> None:
    if not paths:
        raise DataError("no file is given; name at least one")
    seen: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; check the path")
        other = seen.setdefault(path.resolve(), path)
        if other is not path:
            raise DataError(f"{path} is the same file as {other}; give each file once")


def _names(paths: Sequence[Path]) -> tuple[str, ...]:
    """Stems of the files, or as much of their resolved paths as tells them apart."""
    # Without the root, which no name of a file may hold: submissions are called by groups.
    whole = [path.resolve().relative_to(path.resolve().anchor) for path in paths]
    short = [path.with_suffix("") if given.is_file() else path for path, given in zip(whole, paths, strict=True)]
    folders = max(len(path.parts) for path in whole)
    for named in (short, whole):
        for depth in range(1, folders + 1):
            names = tuple("_".join(path.parts[-depth:]) for path in named)
            if len(set(names)) == len(names):
                return names
    raise AssertionError("distinct paths have distinct names")


def _mnli_names(names: tuple[str, ...]) -> tuple[str, ...]:
    short = tuple(next((part for part in _MNLI_PARTS if name.endswith(part)), name) for name in names)
    if len(names) == 1:
        return tuple(name if name in _MNLI_PARTS else "" for name in short)
    return short if len(set(short)) == len(short) else names
