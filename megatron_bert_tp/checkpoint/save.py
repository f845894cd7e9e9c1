"""Saving in three phases, after each of which a kill leaves the previous checkpoint as it was.

    rank 0           remove leftovers, make ``step_N.partial``
    --- agree ---
    every rank       write its tensor file and a note on it, synced
    --- agree ---
    rank 0           merge the notes to the manifest, check, rename, move the pointer, remove old checkpoints
    --- agree ---

After each phase the ranks tell each other what failed: all of them go on, or all of them raise the same.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_bert_tp.checkpoint.directories import (
    clear_leftovers,
    partial_directory,
    publish,
    purge,
    step_directory,
)
from megatron_bert_tp.checkpoint.durable import (
    JSON,
    is_basename,
    no_room,
    sync,
    write_text,
)
from megatron_bert_tp.checkpoint.manifest import MANIFEST, FileRecord, Manifest, Note, record_of
from megatron_bert_tp.checkpoint.slices import DTYPES, Rectangle, Slice, check_coverage
from megatron_bert_tp.checkpoint.tensor_file import Content, write_tensor_file
from megatron_bert_tp.errors import CheckpointError, MegatronBertError


def save_checkpoint(
    root: Path,
    step: int,
    rectangles: Sequence[Rectangle],
    *,
    facts: Mapping[str, JSON],
    attachments: Mapping[str, Path],
    rank: int,
    world_size: int,
    agree: Callable[[str | None], str | None],
    keep_last: int,
) -> Path:
    """Save what all ranks hand in as ``root/step_N`` and return that path; every rank must call it.

    ``rectangles`` of all ranks together must cover each tensor exactly once; a rank may have none.
    ``attachments`` are files that go along under a plain name; those and ``facts`` count on rank 0.
    ``keep_last`` newest checkpoints stay.  ``agree`` takes what failed on this rank, or None, and gives
    every rank what failed on the first rank on which anything did.  CheckpointError, the same one on every
    rank, when a rank cannot write.
    """
    partial = partial_directory(root, step)

    def prepare() -> None:
        if rank == 0:
            prepare_directory(root, step)

    def write() -> None:
        write_rectangles(partial, rank, rectangles)

    def commit() -> None:
        if rank == 0:
            commit_checkpoint(root, step, world_size, facts=facts, attachments=attachments, keep_last=keep_last)

    for phase in (prepare, write, commit):
        _run(phase, agree)
    return step_directory(root, step)


def prepare_directory(root: Path, step: int) -> Path:
    """First phase, on rank 0: an empty directory to write to; what killed runs left behind is removed."""
    partial = partial_directory(root, step)
    try:
        root.mkdir(parents=True, exist_ok=True)
        clear_leftovers(root)
        partial.mkdir()
    except OSError as error:
        raise CheckpointError(
            f"{partial}: cannot be made ({error}); choose a folder that can be written"
        ) from error
    return partial


def write_rectangles(partial: Path, rank: int, rectangles: Sequence[Rectangle]) -> None:
    """Second phase, on every rank: one tensor file, where there is anything to write, and the note on it."""
    rows = [_row(rectangle, _file_name(rank)) for rectangle in rectangles]
    contents = [_content(row.name, rectangle) for row, rectangle in zip(rows, rectangles, strict=True)]
    if len({row.name for row in rows}) < len(rows):
        raise CheckpointError(f"rank {rank} hands in two rectangles of one tensor; a file holds one of each")
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
    partial = prepare_directory(root, step)
    rows = [_whole_row(content, _file_name(0)) for content in contents]
    _write_rank(partial, 0, rows, contents, advance)
    return commit_checkpoint(root, step, 1, facts=facts, attachments=attachments, keep_last=1)


def commit_checkpoint(
    root: Path,
    step: int,
    world_size: int,
    *,
    facts: Mapping[str, JSON],
    attachments: Mapping[str, Path],
    keep_last: int,
) -> Path:
    """Third phase, on rank 0: manifest, check, rename, pointer, and only then the removal of old checkpoints."""
    partial = partial_directory(root, step)
    try:
        files, slices = _collect(partial, world_size)
        files |= _attach(partial, attachments)
        check_coverage(slices)
        write_text(partial / MANIFEST, Manifest(step, facts, files, tuple(attachments), tuple(slices)).dump())
        for rank in range(world_size):
            (partial / note_name(rank)).unlink()
        sync(partial)
        whole = publish(partial, root, step)
        purge(root, step, keep_last=keep_last)
    except OSError as error:
        raise CheckpointError(f"{partial}: the checkpoint could not be completed: {error}") from error
    return whole


def note_name(rank: int) -> str:
    """File in which a rank tells rank 0 what it has written."""
    return f"rank_{rank:05d}.json"


def _run(phase: Callable[[], None], agree: Callable[[str | None], str | None]) -> None:
    """Run this rank's part of a phase; CheckpointError on every rank when any of them failed."""
    failure: Exception | None = None
    try:
        phase()
    except Exception as error:  # whatever it is, the other ranks wait for the answer of this one
        failure = error
    told = agree(None if failure is None else _text(failure))
    if told is None:
        return
    if failure is not None and not isinstance(failure, MegatronBertError | OSError):
        raise failure  # a bug keeps its traceback
    raise CheckpointError(told) from failure


def _text(failure: Exception) -> str:
    """What the others are told; a bug is named by its kind, since its message alone says little."""
    if isinstance(failure, MegatronBertError | OSError):
        return str(failure)
    return f"not saved, because of {type(failure).__name__} on another rank: {failure}"


def _row(rectangle: Rectangle, file: str) -> Slice:
    dtype = str(rectangle.tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CheckpointError(f"{rectangle.name}: {dtype} cannot be saved; only {', '.join(DTYPES)} can")
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
        _write_tensors(path, contents, advance)
        files[path.name] = record_of(path)
    _write_note(partial / note_name(rank), Note(files, tuple(rows)).dump())


def _write_tensors(path: Path, contents: Sequence[Content], advance: Callable[[int], None] | None) -> None:
    """Write and sync a tensor file; CheckpointError with need and free space when it does not fit."""
    need = sum(content.size for content in contents)
    try:
        if need > shutil.disk_usage(path.parent).free:
            raise OSError("the disk is too full")
        write_tensor_file(path, contents, advance=advance)
    except OSError as error:
        raise CheckpointError(no_room(path, need, error)) from error


def _write_note(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise CheckpointError(no_room(path, len(text), error)) from error


def _collect(partial: Path, world_size: int) -> tuple[dict[str, FileRecord], list[Slice]]:
    """Files and rows of all ranks' notes."""
    files: dict[str, FileRecord] = {}
    slices: list[Slice] = []
    for rank in range(world_size):
        path = partial / note_name(rank)
        if not path.is_file():
            raise CheckpointError(
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
            raise CheckpointError(f"{name!r} cannot be the name of a file beside the tensors of a checkpoint")
        shutil.copyfile(source, target)
        sync(target)
        records[name] = record_of(target)
    return records
