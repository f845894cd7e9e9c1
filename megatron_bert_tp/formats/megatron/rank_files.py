"""Which files of a Megatron-LM directory, or of a zip, make up its checkpoint: one for each rank."""

import re
from collections.abc import Callable, Iterable, Mapping

from megatron_bert_tp.errors import FormatError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
FILE = "model_optim_rng.pt"
_RANK = re.compile(r"(?:(.*)/)?mp_rank_(\d{2,3})(?:_(\d{3}))?/(?:model_optim_rng|model_rng)\.pt", re.DOTALL)
_ITERATION = re.compile(r"[0-9]{1,12}")
_LARGEST_GRID = 4096  # ranks

Place = tuple[int, int]
"""Tensor rank and pipeline stage."""


def find_grid(paths: Iterable[str], read_text: Callable[[str], str], *, source: str) -> dict[Place, str]:
    """File of every rank, among those of a directory that are given by their paths in it with ``/``.

    The tracker file says which, where there are several.  FormatError when there is none, no way to tell,
    or one of tensor x pipeline ranks without a file.
    """
    paths = list(paths)
    folders = _by_folder(paths, source)
    if folders:
        return _complete(folders[_chosen(folders, paths, read_text, source)], source)
    single = [path for path in paths if path.rpartition("/")[2] == FILE]
    if len(single) == 1:
        return {(0, 0): single[0]}
    sharded = any(path.rpartition("/")[2] in (".metadata", "metadata.json") for path in paths)
    hint = "; it looks like a distributed checkpoint of megatron-core: save it with --ckpt-format torch"
    raise FormatError(f"{source}: has no mp_rank_XX/{FILE}{hint if sharded else ''}")


def folder_of(rank: int, stage: int, *, pipeline: int) -> str:
    """Folder of a rank; stages are named only where there are several."""
    return f"mp_rank_{rank:02d}_{stage:03d}" if pipeline > 1 else f"mp_rank_{rank:02d}"


def grid_size(places: Iterable[Place]) -> tuple[int, int]:
    """Tensor and pipeline size of a checkpoint."""
    ranks, stages = zip(*places, strict=True)
    return 1 + max(ranks), 1 + max(stages)


def _complete(files: Mapping[Place, str], source: str) -> dict[Place, str]:
    """The files in order; FormatError when one is missing."""
    tensor, pipeline = grid_size(files)
    if tensor * pipeline > _LARGEST_GRID:
        raise FormatError(f"{source}: {tensor} x {pipeline} ranks are not credible; at most {_LARGEST_GRID}")
    places = [(rank, stage) for stage in range(pipeline) for rank in range(tensor)]
    missing = [place for place in places if place not in files]
    if missing:
        raise FormatError(
            f"{source}: the files of {len(missing)} of {tensor} x {pipeline} ranks (tensor x pipeline) are "
            f"missing, the first of tensor rank {missing[0][0]} and stage {missing[0][1]}; fetch them all"
        )
    return {place: files[place] for place in places}


def _by_folder(paths: Iterable[str], source: str) -> dict[str, dict[Place, str]]:
    """Files of ranks by the folder that holds ``mp_rank_XX``."""
    folders: dict[str, dict[Place, str]] = {}
    for path in paths:
        found = _RANK.fullmatch(path)
        if not found:
            continue
        files, place = folders.setdefault(found[1] or "", {}), (int(found[2]), int(found[3] or 0))
        if place in files:
            raise FormatError(f"{source}: {files[place]} and {path} are both of one rank; remove one of them")
        files[place] = path
    return folders


def _chosen(
    folders: Mapping[str, object], paths: Iterable[str], read_text: Callable[[str], str], source: str
) -> str:
    """The folder that a tracker names, or the only one."""
    trackers = [path for path in paths if path.rpartition("/")[2] == TRACKER]
    named = {path.removesuffix(TRACKER) + _folder_name(read_text(path), f"{source}: {path}") for path in trackers}
    listed = ", ".join(sorted(folders))
    missing = sorted(named - folders.keys())
    if missing:
        raise FormatError(f"{source}: {TRACKER} names {missing[0]}, which is not there; there are: {listed}")
    candidates = named or folders.keys()
    if len(candidates) != 1:
        raise FormatError(f"{source}: holds several checkpoints and no {TRACKER}; give one of them: {listed}")
    return next(iter(candidates))


def _folder_name(text: str, source: str) -> str:
    word = text.strip()
    if word == RELEASE:
        return RELEASE
    if not _ITERATION.fullmatch(word):
        raise FormatError(f"{source}: holds {word[:40]!r}; it must hold a whole number or the word {RELEASE}")
    return f"iter_{int(word):07d}"
