"""Where checkpoints stand: step directories, the pointer to the newest, and what a killed run leaves behind.

root/
    latest                            the name of the newest checkpoint, and nothing else
    step_00000100/                    a whole checkpoint
    step_00000200.partial-1f0c9a3e/   one that is being written, or removed, or whose run was killed
    step_00000100.replaced/           the old one of a step that is just saved again

A partial directory has a name of its own in every attempt: a rank of a run that is believed dead cannot write
into that of the run after it.  Nothing here follows a symbolic link.
"""

import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from megatron_bert_tp.checkpoint.durable import fresh_name, replace_text, sync
from megatron_bert_tp.checkpoint.manifest import MANIFEST
from megatron_bert_tp.errors import CheckpointError

POINTER = "latest"
_STEP = re.compile(r"step_([0-9]{8,18})")
_PARTIAL = re.compile(r"step_[0-9]{8,18}\.partial(-\w+)?")  # without a token: those of older versions
_LONGEST_POINTER = 64  # bytes


@dataclass(frozen=True)
class Keep:
    """Which checkpoints outlive the next one: the ``last`` newest, multiples of ``every``, and the ``best``."""

    last: int
    every: int | None = None
    best: int | None = None

    def forever(self, step: int) -> bool:
        """Whether the checkpoint of that step is not removed."""
        return step == self.best or (self.every is not None and step % self.every == 0)


def step_directory(root: Path, step: int) -> Path:
    """Directory of a whole checkpoint."""
    return root / f"step_{step:08d}"


def step_of(directory: Path) -> int:
    """Step in the name of a checkpoint's directory, whole or replaced."""
    match = _STEP.match(directory.name)
    assert match, directory
    return int(match.group(1))


def partial_directory(root: Path, step: int, token: str) -> Path:
    """Directory in which one attempt, told apart by its token, writes a checkpoint; readers never look at it."""
    return _beside(step_directory(root, step), f"partial-{token}")


def new_token() -> str:
    """Token of an attempt."""
    return uuid4().hex[:8]


def latest_checkpoint(root: Path) -> Path | None:
    """The step directory that ``root/latest`` names, or None where nothing was ever saved.

    Without a pointer (a kill just before the first one was written, or a user who removed it) the newest one
    counts: a directory has its final name only when it is whole.
    CheckpointError when the pointer is damaged or names a directory that is not there.
    """
    name = pointed(root)
    if name is None:
        steps = _steps(root) if root.is_dir() else []
        return step_directory(root, max(steps)) if steps else None
    for directory in (root / name, _beside(root / name, "replaced")):
        if (directory / MANIFEST).is_file():
            return directory
    raise CheckpointError(f"{root / POINTER}: names {name}, which is not a checkpoint in {root}{_choices(root)}")


def pointed(root: Path) -> str | None:
    """The name in ``root/latest``; None where there is no such file, CheckpointError when it is damaged."""
    pointer = root / POINTER
    if not pointer.is_file():
        return None
    if pointer.is_symlink():
        raise CheckpointError(f"{pointer}: is a symbolic link, which no run makes; remove it to take the newest")
    with pointer.open("rb") as file:
        name = file.read(_LONGEST_POINTER).decode(errors="replace").removesuffix("\n")
    if not _STEP.fullmatch(name):
        raise CheckpointError(
            f"{pointer}: must hold the name of a checkpoint such as step_00000100, not {name!r}{_choices(root)}"
        )
    return name


def candidates(root: Path) -> list[Path]:
    """All that may be a checkpoint of ``root``, newest step first; the old one of a step after the new one."""
    whole = [step_directory(root, step) for step in _steps(root)] if root.is_dir() else []
    found = [*whole, *_siblings(root, "replaced")]
    return sorted(found, key=lambda path: (-step_of(path), path.name))


def partials(root: Path) -> list[Path]:
    """Directories of checkpoints that were begun and not finished, or not wholly removed."""
    found = (path for path in root.glob("step_*.partial*") if _PARTIAL.fullmatch(path.name))
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


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


def clear_leftovers(root: Path) -> list[str]:
    """Remove what killed runs left, and tell it; a second save of a step cut between its renames is undone.

    What cannot be removed is told too, and stays.  So does what a second save of its step has replaced, until the
    next checkpoint stands: it may be the only one that is whole.
    """
    told = []
    for old in _siblings(root, "replaced"):
        whole = old.with_suffix("")
        if not whole.exists():
            old.rename(whole)
            told.append(f"gave {old} its name {whole.name} back: the save that was to replace it was cut off")
    told += [_removal(partial) or f"removed {partial}, which was not finished" for partial in partials(root)]
    fresh_name(root / POINTER).unlink(missing_ok=True)
    return told


def publish(partial: Path, root: Path, step: int) -> Path:
    """Give a written checkpoint its name and point ``latest`` to it; an older one of the same step goes after."""
    whole = step_directory(root, step)
    old = _beside(whole, "replaced")
    if whole.exists() and old.exists():
        remove(whole)  # passed over when the run went on from the old one
    elif whole.exists():
        whole.rename(old)
    try:
        partial.rename(whole)
    except OSError:
        if old.exists():
            old.rename(whole)
        raise
    sync(root)
    replace_text(root / POINTER, f"{whole.name}\n")
    return whole


def purge(root: Path, step: int, keep: Keep) -> tuple[list[Path], list[str]]:
    """Remove checkpoints older than ``step`` of which ``keep.last``, it included, are newer; and replaced ones.

    Gives what was removed, and in words what could not be: the next purge tries again.
    """
    older = sorted(number for number in _steps(root) if number < step)
    surplus = older[: max(0, len(older) - keep.last + 1)]
    aged = [step_directory(root, number) for number in surplus if not keep.forever(number)]
    failures = {directory: _removal(directory) for directory in (*_siblings(root, "replaced"), *aged)}
    return [each for each in aged if failures[each] is None], [text for text in failures.values() if text]


def _removal(directory: Path) -> str | None:
    """Remove a directory; in words why that failed."""
    try:
        remove(directory)
    except OSError as error:
        return f"cannot remove {directory}: {error}; remove it by hand, or leave it to the next save"
    return None


def remove(directory: Path) -> None:
    """Remove a checkpoint; a kill in the middle leaves no half of it under a good name."""
    partial = directory.with_name(f"{directory.name.partition('.')[0]}.partial-{new_token()}")
    directory.rename(partial)
    shutil.rmtree(partial)


def discard(partial: Path) -> None:
    """Remove what was begun, so that its space is free again; what cannot be removed the next save removes."""
    with suppress(OSError):
        shutil.rmtree(partial)


def _beside(directory: Path, suffix: str) -> Path:
    return directory.with_name(f"{directory.name}.{suffix}")


def _siblings(root: Path, suffix: str) -> list[Path]:
    found = root.glob(f"step_*.{suffix}")
    return [path for path in found if _STEP.fullmatch(path.stem) and path.is_dir() and not path.is_symlink()]


def _steps(root: Path) -> list[int]:
    named = [(_STEP.fullmatch(path.name), path) for path in root.iterdir()]
    steps = [(int(match.group(1)), path) for match, path in named if match and not path.is_symlink()]
    # Step 100 is step_00000100, and not step_000000100 too.
    return [step for step, path in steps if path == step_directory(root, step) and path.is_dir()]


def _choices(root: Path) -> str:
    steps = sorted(_steps(root))
    names = ", ".join(step_directory(root, step).name for step in steps[-3:])
    if not steps:
        return "; remove it to start anew"
    return f"; write one of {names} into it, or remove it to take the newest"
