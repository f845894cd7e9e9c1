"""Where a Megatron-LM checkpoint may lie: a zip, a directory, or one file."""

import zipfile
from pathlib import Path

from megatron_bert_tp.checkpoint.durable import check_regular
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.megatron.archive import extract_member, holds, member_names, read_member
from megatron_bert_tp.formats.megatron.isolated import PickledFile
from megatron_bert_tp.formats.megatron.rank_files import Place, find_grid

_PATTERNS = ("*", "*/*", "*/*/*", "*/*/*/*")  # a folder, its iterations, their ranks, their files
_LARGEST_TRACKER = 1000  # bytes
_CONTENT = "data.pkl"  # in every zip that torch.save writes


def find_files(source: Path, folder: Path) -> dict[Place, PickledFile]:
    """The file of every rank; those of a zip are taken out into ``folder``, under names of our own.

    FormatError when there is no checkpoint, or the zip is unsafe.
    """
    if source.is_dir():
        return _of_directory(source)
    if not source.exists():
        raise FormatError(f"{source}: no such file or directory; give a zip, a directory or a .pt")
    check_regular(source, FormatError)
    if not zipfile.is_zipfile(source) or holds(source, _CONTENT):
        return {(0, 0): PickledFile(str(source), source)}
    return _of_zip(source, folder)


def _of_directory(source: Path) -> dict[Place, PickledFile]:
    paths = [path.relative_to(source).as_posix() for pattern in _PATTERNS for path in source.glob(pattern)]
    grid = find_grid(paths, lambda path: _read_start(source / path), source=str(source))
    for path in grid.values():
        check_regular(source / path, FormatError)
    return {place: PickledFile(str(source / path), source / path) for place, path in grid.items()}


def _of_zip(source: Path, folder: Path) -> dict[Place, PickledFile]:
    def read_text(name: str) -> str:
        return read_member(source, name, largest=_LARGEST_TRACKER).decode("ascii", "replace")

    files = {}
    for (rank, stage), name in find_grid(member_names(source), read_text, source=str(source)).items():
        target = folder / f"{rank}_{stage}.pt"
        extract_member(source, name, target)
        files[rank, stage] = PickledFile(f"{source}: {name}", target)
    return files


def _read_start(path: Path) -> str:
    check_regular(path, FormatError)
    with path.open("rb") as file:
        return file.read(_LARGEST_TRACKER).decode("ascii", "replace")
