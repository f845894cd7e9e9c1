"""Where checkpoints stand: step directories, the pointer to the newest, and what a killed run leaves behind.

root/
    latest                   the name of the newest checkpoint, and nothing else
    step_00000100/           a whole checkpoint
    step_00000200.partial/   one that is being written, or whose run was killed
    step_00000100.replaced/  the old one of a step that is just saved again
"""

import re
import shutil
from pathlib import Path

from megatron_bert_tp.checkpoint.durable import replace_text, sync
from megatron_bert_tp.checkpoint.manifest import MANIFEST
from megatron_bert_tp.errors import CheckpointError

POINTER = "latest"
_STEP = re.compile(r"step_(\d{8,})")


def step_directory(root: Path, step: int) -> Path:
    """Directory of a whole checkpoint."""
    return root / f"step_{step:08d}"


def partial_directory(root: Path, step: int) -> Path:
    """Directory in which a checkpoint is written; readers never look at it."""
    return _beside(step_directory(root, step), "partial")


def latest_checkpoint(root: Path) -> Path | None:
    """The step directory that ``root/latest`` names, or None where nothing was ever saved.

    Without a pointer (a kill just before the first one was written, or a user who removed it) the newest one
    counts: a directory has its final name only when it is whole.
    CheckpointError when the pointer is damaged or names a directory that is not there.
    """
    pointer = root / POINTER
    if not pointer.is_file():
        steps = _steps(root) if root.is_dir() else []
        return step_directory(root, max(steps)) if steps else None
    name = pointer.read_bytes()[:64].decode(errors="replace").strip()
    if not _STEP.fullmatch(name):
        raise CheckpointError(
            f"{pointer}: must hold the name of a checkpoint such as step_00000100, not {name!r}{_choices(root)}"
        )
    for directory in (root / name, _beside(root / name, "replaced")):
        if (directory / MANIFEST).is_file():
            return directory
    raise CheckpointError(f"{pointer}: names {name}, which is not a checkpoint in {root}{_choices(root)}")


def find_checkpoint(path: Path) -> Path:
    """Step directory for ``path``: itself, or the newest of a folder of checkpoints or of a run.

    CheckpointError names all that was looked for.
    """
    if (path / MANIFEST).is_file():
        return path
    roots = (path, path / "checkpoints")
    found = next(filter(None, map(latest_checkpoint, roots)), None)
    if found is None:
        looked = ", ".join(str(place) for place in (path / MANIFEST, *(root / POINTER for root in roots)))
        exists = "" if path.is_dir() else f"; {path} is not a directory"
        raise CheckpointError(f"{path}: no checkpoint found; looked for {looked}{exists}")
    return found


def clear_leftovers(root: Path) -> None:
    """Remove what killed runs left behind; a save of the same step that was cut between its renames is undone."""
    for old in _siblings(root, "replaced"):
        whole = old.with_suffix("")
        if whole.exists():
            shutil.rmtree(old)
        else:
            old.rename(whole)
    for partial in _siblings(root, "partial"):
        shutil.rmtree(partial)


def publish(partial: Path, root: Path, step: int) -> Path:
    """Give a written checkpoint its name and point ``latest`` to it; an older one of the same step goes after."""
    whole = step_directory(root, step)
    old = _beside(whole, "replaced")
    if whole.exists():
        whole.rename(old)
    partial.rename(whole)
    sync(root)
    replace_text(root / POINTER, f"{whole.name}\n")
    if old.exists():
        shutil.rmtree(old)
    return whole


def purge(root: Path, step: int, *, keep_last: int) -> None:
    """Remove the checkpoints older than ``step`` of which ``keep_last``, with ``step`` itself, are newer."""
    older = sorted(number for number in _steps(root) if number < step)
    for number in older[: max(0, len(older) - keep_last + 1)]:
        # Renamed first: a run killed in the middle leaves no half checkpoint under a good name.
        partial = partial_directory(root, number)
        step_directory(root, number).rename(partial)
        shutil.rmtree(partial)


def _beside(directory: Path, suffix: str) -> Path:
    return directory.with_name(f"{directory.name}.{suffix}")


def _siblings(root: Path, suffix: str) -> list[Path]:
    found = root.glob(f"step_*.{suffix}")
    return [path for path in found if _STEP.fullmatch(path.stem) and path.is_dir() and not path.is_symlink()]


def _steps(root: Path) -> list[int]:
    matches = [_STEP.fullmatch(path.name) for path in root.iterdir() if path.is_dir() and not path.is_symlink()]
    return [int(match.group(1)) for match in matches if match]


def _choices(root: Path) -> str:
    steps = sorted(_steps(root))
    names = ", ".join(step_directory(root, step).name for step in steps[-3:])
    if not steps:
        return "; remove it to start anew"
    return f"; write one of {names} into it, or remove it to take the newest"
