"""Saving in three phases, after each of which a kill leaves the previous checkpoint as it was.

    every rank       tell how many bytes it will write
    rank 0           remove leftovers, look for room for all of them, make ``step_N.partial-TOKEN``
    --- agree ---
    every rank       write its tensor file and a note on it, synced
    --- agree ---
    rank 0           merge the notes to the manifest, check, rename, move the pointer, remove old checkpoints
    --- agree ---

After each phase the ranks tell each other what failed: all of them go on, or all of them raise the same, and
rank 0 removes what was begun.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_bert_tp.checkpoint.directories import (
    Keep,
    clear_leftovers,
    discard,
    new_token,
    partial_directory,
    publish,
    purge,
    step_directory,
)
from megatron_bert_tp.checkpoint.durable import (
    JSON,
    free_bytes,
    is_basename,
    make_folder,
    no_room,
    sync,
    write_text,
)
from megatron_bert_tp.checkpoint.manifest import MANIFEST, FileRecord, Manifest, Note, record_of
from megatron_bert_tp.checkpoint.ranks import Ranks, told_by_all
from megatron_bert_tp.checkpoint.slices import DTYPES, Rectangle, Slice, check_coverage
from megatron_bert_tp.checkpoint.tensor_file import Content, write_tensor_file
from megatron_bert_tp.errors import SaveError

_TOLD_OF_SLICE = 1000  # bytes, generously: its places in the header, the note and the manifest


@dataclass(frozen=True)
class Saved:
    """What was written: ``num_bytes`` of tensors of all ranks in ``seconds``.

    ``cleared`` tells what killed runs had left and what could not be removed, ``removed`` is what was purged; both
    on rank 0.
    """

    path: Path
    seconds: float
    num_bytes: int
    cleared: tuple[str, ...] = ()
    removed: tuple[Path, ...] = ()


def save_checkpoint(
    root: Path,
    step: int,
    rectangles: Sequence[Rectangle],
    *,
    facts: Mapping[str, JSON],
    attachments: Mapping[str, Path],
    agreement: Ranks,
    keep: Keep,
) -> Saved:
    """Save what all ranks hand in as ``root/step_N``; every rank must call it.

    ``rectangles`` of all ranks together must cover each tensor exactly once; a rank may have none.
    ``attachments`` are files that go along under a plain name; those and ``facts`` count on rank 0.
    SaveError, the same one on every rank, when a rank cannot write; the checkpoints that stood before still do,
    and ``latest`` names what it named.
    """
    started = time.perf_counter()
    plan = _plan(rectangles, agreement)
    partial = partial_directory(root, step, plan.token)
    cleared: list[str] = []
    removed: list[Path] = []

    def prepare() -> None:
        if agreement.rank == 0:
            cleared.extend(prepare_directory(partial, need=plan.need))

    def write() -> None:
        write_rectangles(partial, agreement.rank, rectangles)

    def commit() -> None:
        if agreement.rank == 0:
            gone, failures = commit_checkpoint(
                partial, step, agreement.size, facts=facts, attachments=attachments, keep=keep
            )
            removed.extend(gone)
            cleared.extend(failures)

    try:
        for phase in (prepare, write, commit):
            _together(agreement, phase)
    except BaseException:
        if agreement.rank == 0:
            discard(partial)
        raise
    seconds = time.perf_counter() - started
    return Saved(step_directory(root, step), seconds, plan.num_bytes, tuple(cleared), tuple(removed))


def prepare_directory(partial: Path, *, need: int = 0) -> list[str]:
    """First phase, on rank 0: an empty directory with room for ``need`` bytes; gives what killed runs had left."""
    root = partial.parent
    try:
        make_folder(root)
        cleared = clear_leftovers(root)
        if need > free_bytes(root):
            raise SaveError(no_room(partial, need, OSError("the disk is too full")))
        partial.mkdir()
    except OSError as error:
        raise SaveError(f"{partial}: cannot be made ({error}); choose a folder that can be written") from error
    return cleared


def write_rectangles(partial: Path, rank: int, rectangles: Sequence[Rectangle]) -> None:
    """Second phase, on every rank: one tensor file, where there is anything to write, and the note on it."""
    rows = [_row(rectangle, _file_name(rank)) for rectangle in rectangles]
    contents = [_content(row.name, rectangle) for row, rectangle in zip(rows, rectangles, strict=True)]
    if len({row.name for row in rows}) < len(rows):
        raise SaveError(f"rank {rank} hands in two rectangles of one tensor; a file holds one of each")
    _write_rank(partial, rank, rows, contents)


def save_whole(
    root: Path,
    step: int,
    contents: Sequence[Content],
    *,
    facts: Mapping[str, JSON],
    attachments: Mapping[str, Path],
    advance: Callable[[int], None] | None = None,
) -> Path:
    """Save whole tensors from one process as ``root/step_N``, one block in memory at a time; gives that path.

    ``advance`` hears the bytes of each block.  Otherwise as `save_checkpoint`.
    """
    partial = partial_directory(root, step, new_token())
    rows = [_whole_row(content, _file_name(0)) for content in contents]
    prepare_directory(partial, need=sum(content.size for content in contents) + _TOLD_OF_SLICE * len(rows))
    try:
        _write_rank(partial, 0, rows, contents, advance)
        commit_checkpoint(partial, step, 1, facts=facts, attachments=attachments, keep=Keep(last=1))
    except BaseException:
        discard(partial)
        raise
    return step_directory(root, step)


def commit_checkpoint(
    partial: Path,
    step: int,
    num_ranks: int,
    *,
    facts: Mapping[str, JSON],
    attachments: Mapping[str, Path],
    keep: Keep,
) -> tuple[list[Path], list[str]]:
    """Third phase, on rank 0: manifest, check, rename, pointer, and only then the removal of old checkpoints.

    Gives what was removed, and in words what could not be.
    """
    root, files = partial.parent, dict[str, FileRecord]()
    try:
        files, slices = _collect(partial, num_ranks)
        files |= _attach(partial, attachments)
        check_coverage(slices)
        write_text(partial / MANIFEST, Manifest(step, facts, files, tuple(attachments), tuple(slices)).dump())
        for rank in range(num_ranks):
            (partial / note_name(rank)).unlink()
        sync(partial)
        publish(partial, root, step)
    except OSError as error:
        raise SaveError(no_room(partial, sum(row.size for row in files.values()), error)) from error
    return purge(root, step, keep)


def note_name(rank: int) -> str:
    """File in which a rank tells rank 0 what it has written."""
    return f"rank_{rank:05d}.json"


@dataclass(frozen=True)
class _Plan:
    """What all ranks are about to write: bytes of tensors, rectangles, and the token of this attempt."""

    num_bytes: int
    num_rectangles: int
    token: str

    @property
    def need(self) -> int:
        """Bytes on the disk, at most."""
        return self.num_bytes + _TOLD_OF_SLICE * (self.num_rectangles + 1)


def _plan(rectangles: Sequence[Rectangle], agreement: Ranks) -> _Plan:
    def own() -> str:
        return f"{sum(row.tensor.nbytes for row in rectangles)} {len(rectangles)} {new_token()}"

    told = [text.split() for text in told_by_all(agreement, own, SaveError)]
    return _Plan(sum(int(row[0]) for row in told), sum(int(row[1]) for row in told), told[0][2])


def _together(agreement: Ranks, phase: Callable[[], None]) -> None:
    """Run this rank's part of a phase; SaveError on every rank when any of them failed."""

    def work() -> str:
        phase()
        return ""

    told_by_all(agreement, work, SaveError)


def _row(rectangle: Rectangle, file: str) -> Slice:
    dtype = str(rectangle.tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise SaveError(f"{rectangle.name}: {dtype} cannot be saved; only {', '.join(DTYPES)} can")
    extent = tuple(rectangle.tensor.shape)
    return Slice(rectangle.name, rectangle.shape, rectangle.offsets, extent, dtype, file)


def _whole_row(content: Content, file: str) -> Slice:
    dtype = str(content.dtype).removeprefix("torch.")
    return Slice(content.name, content.shape, (0,) * len(content.shape), content.shape, dtype, file)


def _content(name: str, rectangle: Rectangle) -> Content:
    tensor = rectangle.tensor
    return Content(name, tuple(tensor.shape), tensor.dtype, lambda: (tensor,))


def _file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _write_rank(
    partial: Path,
    rank: int,
    rows: Sequence[Slice],
    contents: Sequence[Content],
    advance: Callable[[int], None] | None = None,
) -> None:
    """The file of a rank, where there is anything to write, and the note on it."""
    files = {}
    if rows:
        path = partial / rows[0].file
        files[path.name] = _write_tensors(path, contents, advance)
    _write_note(partial / note_name(rank), Note(files, tuple(rows)).dump())


def _write_tensors(path: Path, contents: Sequence[Content], advance: Callable[[int], None] | None) -> FileRecord:
    """Write and sync a tensor file; SaveError with need and free space when it does not fit."""
    try:
        return write_tensor_file(path, contents, advance=advance)
    except OSError as error:
        raise SaveError(no_room(path, sum(content.size for content in contents), error)) from error


def _write_note(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise SaveError(no_room(path, len(text), error)) from error


def _collect(partial: Path, num_ranks: int) -> tuple[dict[str, FileRecord], list[Slice]]:
    """Files and rows of all ranks' notes."""
    files: dict[str, FileRecord] = {}
    slices: list[Slice] = []
    for rank in range(num_ranks):
        path = partial / note_name(rank)
        if not path.is_file():
            raise SaveError(
                f"{path}: rank {rank} wrote it, but rank 0 does not see it; choose a folder on a file system "
                "that all nodes share"
            )
        note = Note.read(path)
        files |= note.files
        slices += note.slices
    return files, slices


def _attach(partial: Path, attachments: Mapping[str, Path]) -> dict[str, FileRecord]:
    """Copy files in under their plain names."""
    records = {}
    for name, source in attachments.items():
        target = partial / name
        if not is_basename(name) or target.exists() or name == MANIFEST:
            raise SaveError(f"{name!r} cannot be the name of a file beside the tensors of a checkpoint")
        shutil.copyfile(source, target)
        sync(target)
        records[name] = record_of(target)
    return records
