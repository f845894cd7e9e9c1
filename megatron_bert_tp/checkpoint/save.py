"""Saving in three phases, after each of which a kill leaves the previous checkpoint as it was.

    rank 0           remove leftovers, make ``step_N.partial``
    --- barrier ---
    every rank       write its tensor file and a note on it, synced
    --- barrier ---
    rank 0           merge the notes to the manifest, check, rename, move the pointer, remove old checkpoints
    --- barrier ---

A rank that fails goes on to the barriers before it raises, so that the others do not wait for it.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

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
    read_object,
    readable,
    sha256_of,
    sync,
    write_text,
)
from megatron_bert_tp.checkpoint.manifest import MANIFEST, FileRecord, Manifest, parse_record, parse_slice
from megatron_bert_tp.checkpoint.slices import Rectangle, Slice, check_coverage
from megatron_bert_tp.errors import CheckpointError

_LARGEST_NOTE = 64 * 2**20  # bytes


def save_checkpoint(
    root: Path,
    step: int,
    rectangles: Sequence[Rectangle],
    *,
    facts: Mapping[str, JSON],
    attachments: Mapping[str, Path],
    rank: int,
    world_size: int,
    barrier: Callable[[], None],
    keep_last: int,
) -> Path:
    """Save what all ranks hand in as ``root/step_N`` and return that path; every rank must call it.

    ``rectangles`` of all ranks together must cover each tensor exactly once; a rank may have none.
    ``attachments`` are files that go along under a plain name; those and ``facts`` count on rank 0.
    ``keep_last`` newest checkpoints stay.  Raises CheckpointError, on every rank, when a rank cannot write.
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

    failure = _first_failure((prepare, write, commit), barrier)
    if failure is not None:
        raise failure
    whole = step_directory(root, step)
    if not (whole / MANIFEST).is_file() or (partial / note_name(rank)).is_file():
        raise CheckpointError(f"{whole}: not saved, because another rank failed; its message says why")
    return whole


def prepare_directory(root: Path, step: int) -> Path:
    """First phase, on rank 0: an empty directory to write to; what killed runs left behind is removed."""
    partial = partial_directory(root, step)
    try:
        root.mkdir(parents=True, exist_ok=True)
        clear_leftovers(root)
        partial.mkdir()
    except OSError as error:
        raise CheckpointError(f"{partial}: cannot be made ({error}); choose a folder that can be written") from error
    return partial


def write_rectangles(partial: Path, rank: int, rectangles: Sequence[Rectangle]) -> None:
    """Second phase, on every rank: one tensor file, where there is anything to write, and the note on it."""
    rows = [_row(rectangle, f"rank_{rank:05d}.safetensors") for rectangle in rectangles]
    tensors = {row.name: given.tensor.cpu().contiguous() for row, given in zip(rows, rectangles, strict=True)}
    if len(tensors) < len(rows):
        raise CheckpointError(f"rank {rank} hands in two rectangles of one tensor; a file holds one of each")
    check_coverage_inside(rows)
    files = {}
    if rows:
        path = partial / rows[0].file
        _write_tensors(path, tensors)
        files[path.name] = asdict(FileRecord(path.stat().st_size, sha256_of(path)))
    note = {"files": files, "slices": [asdict(row) for row in rows]}
    _write_note(partial / note_name(rank), json.dumps(note))


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


def _first_failure(phases: Sequence[Callable[[], None]], barrier: Callable[[], None]) -> Exception | None:
    """Run the phases with a barrier after each; after a failure of this rank, the barriers alone."""
    failure: Exception | None = None
    for phase in phases:
        if failure is None:
            try:
                phase()
            except Exception as error:  # whatever it is, the other ranks wait at the barrier
                failure = error
        barrier()
    return failure
