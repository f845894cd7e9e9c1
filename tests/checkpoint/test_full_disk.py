"""A disk that is or gets full: the old checkpoint stays, what was begun is removed, the message says the need."""

import errno
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_bert_tp.checkpoint.choose import newest_whole
from megatron_bert_tp.checkpoint.directories import Keep, latest_checkpoint
from megatron_bert_tp.checkpoint.save import Saved, save_checkpoint, save_whole
from megatron_bert_tp.checkpoint.slices import Rectangle
from megatron_bert_tp.checkpoint.tensor_file import Content
from megatron_bert_tp.errors import ExitCode, SaveError
from megatron_bert_tp.parallel.agreement import Agreement
from tests.checkpoint.layouts import OneOfThreads, in_threads
from tests.small_disk import mounted

MEGABYTE = 10**6
ALONE = Agreement.alone()
OPTIONS = {"facts": {}, "attachments": {}, "keep": Keep(last=3)}


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 8 MB."""
    with mounted(tmp_path, size="8m") as disk:
        yield disk


def rows(num_bytes: int) -> list[Rectangle]:
    shape = (num_bytes // 4,)
    return [Rectangle("weight/a", shape, (0,), torch.ones(shape))]


def save(root: Path, step: int, num_bytes: int) -> Saved:
    return save_checkpoint(root, step, rows(num_bytes), agreement=ALONE, **OPTIONS)


def assert_only(root: Path, *steps: int) -> None:
    names = {path.name for path in root.iterdir()}
    assert names == {"latest", *(f"step_{step:08d}" for step in steps)}
    choice = newest_whole(root, ALONE)
    assert choice.checkpoint is not None
    assert (choice.checkpoint.step, choice.skipped) == (max(steps), ())


@pytest.mark.parametrize("limit", [0, 100, 5000, 100_000])
def test_a_file_that_may_not_grow_leaves_the_old_checkpoint_and_nothing_else(tmp_path, limit):
    save(tmp_path, 1, 1000)
    with largest_file(limit), pytest.raises(SaveError) as raised:
        save(tmp_path, 2, 400_000)
    path = r"/step_00000002\.partial-\w{8}/rank_00000\.safetensors"
    need = r"it needs 400\.0 kB, and [\d.]+ [GT]B are free"
    message = rf"{tmp_path}{path}: cannot be written: \[Errno 27\] File too large; {need}"
    assert re.match(message, str(raised.value))
    assert raised.value.exit_code == ExitCode.CANNOT_WRITE
    assert_only(tmp_path, 1)


def test_an_import_that_does_not_fit_leaves_nothing(tmp_path):
    content = Content("weight/a", (1000,), torch.float32, lambda: (torch.ones(1000),))
    with largest_file(2000), pytest.raises(SaveError, match=r"it needs 4\.0 kB"):
        save_whole(tmp_path, 0, [content], facts={}, attachments={})
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_does_not_fit_leaves_the_old_checkpoint(tmp_path):
    save(tmp_path, 1, 1000)
    with largest_file(5000), pytest.raises(SaveError, match=r"cannot be written: \[Errno 27\].*are free"):
        save_checkpoint(tmp_path, 2, rows(1000), agreement=ALONE, **{**OPTIONS, "facts": {"long": "x" * 9000}})
    assert_only(tmp_path, 1)


def test_a_checkpoint_that_does_not_fit_is_refused_before_the_first_byte(small_disk):
    save(small_disk, 1, 5 * MEGABYTE)
    before = os.statvfs(small_disk).f_bavail
    with pytest.raises(SaveError, match=r"the disk is too full; it needs 5\.0 MB, and 3\.\d MB are free"):
        save(small_disk, 2, 5 * MEGABYTE)
    assert os.statvfs(small_disk).f_bavail == before
    assert_only(small_disk, 1)


def test_the_ranks_are_counted_together(small_disk):
    """Each alone would fit."""

    def work(agreement: OneOfThreads) -> None:
        row = Rectangle("weight/a", (3, 10**6), (agreement.rank, 0), torch.ones(1, 10**6))
        save_checkpoint(small_disk, 1, [row], agreement=agreement, **OPTIONS)

    raised = in_threads(3, work)
    assert all(isinstance(error, SaveError) for error in raised)
    assert all("it needs 12.0 MB, and 8.4 MB are free" in str(error) for error in raised)
    assert list(small_disk.iterdir()) == []


def test_what_a_kill_left_does_not_count_against_the_next_save(small_disk):
    left = small_disk / "step_00000001.partial-0123abcd"
    left.mkdir()
    (left / "rank_00000.safetensors").write_bytes(bytes(5 * MEGABYTE))
    save(small_disk, 2, 5 * MEGABYTE)
    assert_only(small_disk, 2)


class FilledMeanwhile:
    """One rank, beside whom somebody fills the disk when it has looked for room."""

    rank, size = 0, 1

    def __init__(self, disk: Path, leave: int) -> None:
        self._disk, self._leave = disk, leave

    def texts(self, text: str | None) -> list[str | None]:
        if list(self._disk.glob("*.partial-*")) and not (self._disk / "other").exists():
            free = os.statvfs(self._disk).f_bavail * os.statvfs(self._disk).f_frsize
            (self._disk / "other").write_bytes(bytes(free - self._leave))
        return [text]


# The last leaves room for the tensors (489 pages) and the note on them, and not for the manifest.
@pytest.mark.parametrize("leave", [0, 8192, MEGABYTE, 490 * 4096])
def test_a_disk_that_fills_while_writing_keeps_the_old_checkpoint_and_gets_its_space_back(small_disk, leave):
    save(small_disk, 1, MEGABYTE)
    agreement = FilledMeanwhile(small_disk, leave)
    with pytest.raises(SaveError) as raised:
        save_checkpoint(small_disk, 2, rows(2 * MEGABYTE), agreement=agreement, **OPTIONS)
    assert re.search(r"cannot be written: \[Errno 28\].*; it needs .*B, and .*B? ?\w* are free", str(raised.value))
    (small_disk / "other").unlink()
    assert_only(small_disk, 1)
    save(small_disk, 2, 2 * MEGABYTE)
    assert_only(small_disk, 1, 2)


@pytest.mark.parametrize("refusal", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("number", range(7))
def test_a_disk_that_refuses_to_sync_leaves_a_whole_checkpoint(tmp_path, monkeypatch, refusal, number):
    """Any of the seven: tensors, note, manifest, directory, its name, the pointer, its name."""
    save(tmp_path, 1, 1000)
    sync, calls = os.fsync, []

    def refuse(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == number + 1:
            raise OSError(refusal, os.strerror(refusal))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(SaveError, match=rf"\[Errno {refusal}\].*it needs .*, and .* are free"):
        save(tmp_path, 2, 1000)
    assert number < 4 or latest_checkpoint(tmp_path) is not None
    choice = newest_whole(tmp_path, ALONE)
    assert choice.checkpoint is not None
    # From the renaming on the new one is whole, whatever the pointer says.
    assert choice.checkpoint.step == (1 if number < 4 else 2)
    assert not list(tmp_path.glob("*.partial*"))
