"""Damaged checkpoints, finished runs and changed settings, from the start of a run (rows 7, 8 and 20)."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bert_tp.checkpoint.directories import pointed, step_directory
from megatron_bert_tp.errors import ExitCode
from tests.faults.runs import assert_ends_like, differing, launch, tensors_of
from tests.training.runs import make_data, records

DATA = "parallel.shard_optimizer=true"


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def stranger(path: Path) -> None:
    shutil.copyfile(path, path.with_name("rank_00007.safetensors"))


TENSORS = "rank_00000.safetensors"
DAMAGES: list[tuple[Callable[[Path], object], str, str]] = [
    (flip, TENSORS, TENSORS),
    (flip, "manifest.json", "manifest.json"),
    (flip, "vocab.txt", "vocab.txt"),
    (cut, "manifest.json", "manifest.json"),
    (empty, TENSORS, TENSORS),
    (Path.unlink, TENSORS, TENSORS),
    (stranger, TENSORS, "rank_00007.safetensors"),
]
NAMES = [f"{damage.__name__}-{name}" for damage, name, _ in DAMAGES]


@pytest.fixture
def finished(whole, tmp_path) -> Path:
    """A copy of a finished run of one process, with checkpoints of step 8 and 12."""
    return Path(shutil.copytree(whole(processes=1), tmp_path / "run"))


def newest(folder: Path) -> Path:
    return step_directory(folder / "checkpoints", 12)


def bytes_and_times(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("exit.json", "lock")]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.faults
@pytest.mark.parametrize(("damage", "name", "told"), DAMAGES, ids=NAMES)
def test_a_damaged_checkpoint_is_passed_over_by_name_and_its_steps_run_again(
    data, whole, finished, damage, name, told
):
    """Rows 7 and 8: the same bits in the end."""
    damage(newest(finished) / name)
    again = launch(data, finished, processes=1)
    assert again.code == 0, again.output
    assert f"checkpoint passed over: {newest(finished) / told}: " in again.output
    assert "step_00000008, step 8" in again.output
    assert_ends_like(finished, whole(processes=1))


def test_two_ranks_pass_over_what_only_one_of_them_reads(data, whole, tmp_path):
    """Row 7: each verifies every second file, and both go on from the same checkpoint."""
    folder = Path(shutil.copytree(whole(DATA), tmp_path / "run"))
    flip(newest(folder) / "rank_00001.safetensors")
    again = launch(data, folder, DATA)
    assert again.outcome["code"] == 0, again.output
    assert f"checkpoint passed over: {newest(folder) / 'rank_00001.safetensors'}: " in again.output
    assert_ends_like(folder, whole(DATA))


@pytest.mark.parametrize("pointer", ["step_00000099\n", pytest.param("\0\xff", marks=pytest.mark.faults)])
def test_a_pointer_that_leads_nowhere_is_told_and_the_newest_taken(data, finished, pointer):
    """Row 8: a stale pointer, and one with other bytes."""
    (finished / "checkpoints" / "latest").write_text(pointer, encoding="latin-1")
    shutil.rmtree(newest(finished))
    again = launch(data, finished, processes=1)
    assert again.code == 0, again.output
    assert f"checkpoint passed over: {finished / 'checkpoints' / 'latest'}: " in again.output
    assert "step_00000008, step 8" in again.output
    assert pointed(finished / "checkpoints") == newest(finished).name


@pytest.mark.faults
def test_where_no_checkpoint_is_whole_nothing_is_trained(data, finished):
    """Row 7: exit code 4, all files named, nothing touched."""
    named = [step_directory(finished / "checkpoints", step) / TENSORS for step in (8, 12)]
    for path in named:
        flip(path)
    before = bytes_and_times(finished)
    again = launch(data, finished, processes=1)
    assert again.code == again.outcome["code"] == ExitCode.BAD_CHECKPOINT
    assert all(f"{path}: its content does not fit" in again.outcome["cause"] for path in named)
    assert bytes_and_times(finished) == before


@pytest.mark.faults
@pytest.mark.parametrize(("damage", "name", "told"), DAMAGES[:1] + DAMAGES[4:6], ids=NAMES[:1] + NAMES[4:6])
def test_a_damaged_checkpoint_that_was_asked_for_is_refused_by_name(data, finished, tmp_path, damage, name, told):
    """Row 7: an explicit one is never replaced by another."""
    damage(newest(finished) / name)
    folder = tmp_path / "other"
    ended = launch(data, folder, f"run.resume={newest(finished)}", processes=1)
    assert ended.code == ended.outcome["code"] == ExitCode.BAD_CHECKPOINT, ended.output
    assert ended.outcome["cause"].startswith(f"{newest(finished) / told}: ")
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.faults
@pytest.mark.parametrize(("processes", "given"), [(1, ()), (2, (DATA,))])
def test_a_finished_run_says_so_and_changes_nothing(data, whole, tmp_path, processes, given):
    """Row 20: exit code 0, and no byte and no time of a file is another."""
    folder = Path(shutil.copytree(whole(*given, processes=processes), tmp_path / "run"))
    before = bytes_and_times(folder)
    again = launch(data, folder, *given, processes=processes)
    assert (again.code, again.outcome["code"], again.outcome["step"]) == (0, 0, 12), again.output
    assert "already finished: optimizer.steps is 12" in again.output
    assert bytes_and_times(folder) == before


@pytest.mark.faults
def test_two_runs_from_one_checkpoint_are_the_same(data, whole, tmp_path):
    """Row 20: bit for bit each other, and the run that they were taken from."""
    start = step_directory(whole(DATA) / "checkpoints", 8)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        ended = launch(data, folder, DATA, f"run.resume={start}")
        assert ended.outcome["code"] == 0, ended.output
        assert [row["step"] for row in records(folder, "step")] == [9, 10, 11, 12]
        assert differing(tensors_of(folder), tensors_of(whole(DATA))) == []


@pytest.mark.faults
def test_changed_settings_and_texts_are_listed_and_refused_unless_they_are_allowed(data, whole, tmp_path):
    """Row 20: exit code 2."""
    start = step_directory(whole(processes=1) / "checkpoints", 8)
    other = tmp_path / "data"
    other.mkdir()
    make_data(other, num_documents=21)
    changes = (
        "optimizer.global_batch=4", "optimizer.learning_rate=2e-2", f"data.corpus={other / 'corpus'}",
        f"run.resume={start}",
    )  # fmt: skip
    folder = tmp_path / "run"
    refused = launch(data, folder, *changes, processes=1)
    assert refused.code == refused.outcome["code"] == ExitCode.BAD_SETTINGS, refused.output
    told = ["optimizer.global_batch: 8 -> 4", "optimizer.learning_rate: 0.01 -> 0.02", "data.corpus: "]
    assert all(f"\n  {change}" in refused.outcome["cause"] for change in told)
    assert "run.allow_changes=true" in refused.outcome["cause"]
    assert not (folder / "metrics.jsonl").exists()
    allowed = launch(data, folder, *changes, "run.allow_changes=true", processes=1)
    assert allowed.code == 0, allowed.output
    assert all(f"changed since then: {change}" in allowed.output for change in told)
