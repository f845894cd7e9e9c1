"""Which checkpoint a run goes on from: the newest that is whole, found by all ranks together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_bert_tp.checkpoint.directories import (
    POINTER,
    candidates,
    find_checkpoint,
    partials,
    pointed,
    step_of,
)
from megatron_bert_tp.checkpoint.durable import sha256_of
from megatron_bert_tp.checkpoint.manifest import MANIFEST
from megatron_bert_tp.checkpoint.ranks import Ranks, told_by_all
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.errors import CheckpointError


@dataclass(frozen=True)
class Choice:
    """The newest whole checkpoint, if there is one, and what is not as it should be, with reasons."""

    checkpoint: Checkpoint | None
    skipped: tuple[str, ...]


def newest_whole(
    root: Path, agreement: Ranks, *, begin: Callable[[str], None] = lambda _name: None
) -> Choice:
    """The checkpoint of ``root`` with the highest step of which every file fits its SHA-256.

    Every rank must call it; they share the reading, and all choose the same.  The pointer does not decide: where
    it is damaged or names another one, that is told.  ``begin`` hears the name of each candidate first.
    """
    skipped = _told_by_first(agreement, lambda: [f"{path}: is not finished" for path in partials(root)])
    for name in _told_by_first(agreement, lambda: [path.name for path in candidates(root)]):
        begin(name)
        try:
            checkpoint = _verified(root / name, agreement)
            _check_step(checkpoint)
        except CheckpointError as error:
            skipped.append(str(error))
        else:
            remarks = _told_by_first(agreement, partial(_remarks, root, checkpoint, skipped))
            return Choice(checkpoint, (*skipped, *remarks))
    return Choice(None, tuple(skipped))


def verified(path: Path, agreement: Ranks) -> Checkpoint:
    """Checkpoint at ``path``, or the newest of a folder of checkpoints or of a run; every rank must call it.

    CheckpointError, the same one on all ranks, names what is missing or damaged.
    """
    found: list[Path] = []

    def find() -> str:
        found.append(find_checkpoint(path))
        return ""

    told_by_all(agreement, find, CheckpointError)
    return _verified(found[0], agreement)


def _verified(directory: Path, agreement: Ranks) -> Checkpoint:
    opened: list[Checkpoint] = []

    def read_share() -> str:
        checkpoint = Checkpoint.at(directory)
        opened.append(checkpoint)
        checkpoint.verify(rank=agreement.rank, size=agreement.size)
        return sha256_of(directory / MANIFEST)

    digests = told_by_all(agreement, read_share, CheckpointError)
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise CheckpointError(
            f"{directory / MANIFEST}: rank {other} reads another file there than rank 0; the folder must be one "
            "that all hosts share"
        )
    return opened[0]


def _check_step(checkpoint: Checkpoint) -> None:
    """The name decides how new a checkpoint is, so it must not lie."""
    if step_of(checkpoint.directory) != checkpoint.step:
        raise CheckpointError(
            f"{checkpoint.directory / MANIFEST}: is of step {checkpoint.step}; the directory was renamed, or its "
            "files are another's"
        )


def _remarks(root: Path, chosen: Checkpoint, skipped: Sequence[str]) -> list[str]:
    """What is wrong with ``root/latest``; nothing that ``skipped`` explains."""
    taken = chosen.directory.name
    try:
        name = pointed(root)
    except CheckpointError as error:
        return [f"{error}; took {taken}"]
    if name is None:
        return [f"{root / POINTER}: is missing; took {taken}, the newest that is whole"]
    is_explained = any(line.startswith(f"{root / name}/") for line in skipped)
    if name == taken.partition(".")[0] or is_explained:
        return []
    return [f"{root / POINTER}: names {name}, but {taken} is the newest that is whole; took that"]


def _told_by_first(agreement: Ranks, make: Callable[[], Sequence[str]]) -> list[str]:
    """Lines that the first rank makes, a message for each; CheckpointError on all ranks where it cannot."""
    lines: list[str | None] = []

    def work() -> str:
        if agreement.rank == 0:
            lines.extend(make())
        return ""

    told_by_all(agreement, work, CheckpointError)
    told: list[str] = []
    lines.append(None)
    while (line := agreement.texts(lines[len(told)] if agreement.rank == 0 else None)[0]) is not None:
        told.append(line)
    return told
