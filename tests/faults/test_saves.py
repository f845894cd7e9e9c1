"""Saves that are cut off, find no room or fail in their thread (rows 3, 6 and 18)."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_bert_tp.checkpoint.directories import candidates, partials, pointed
from megatron_bert_tp.errors import ExitCode
from tests.faults.runs import Ended, assert_ends_like, launch, on_a_quiet_machine, tensors_of
from tests.small_disk import mounted
from tests.training.runs import records

DATA, TENSOR, PIPELINE = "parallel.shard_optimizer=true", "parallel.tensor=2", "parallel.pipeline=2"
EVERYTHING_DIES = [
    # where, of which save, from where the next launch goes on: all is lost until the directory has its name
    ("save", 2, 0),
    ("write", 2, 0),
    ("commit", 4, 2),
    ("rename", 6, 4),
    ("purge", 8, 8),
    ("remove", 10, 10),
]


def steps_of(folder: Path) -> list[int]:
    """Steps of the checkpoints, newest first."""
    return [int(path.name.removeprefix("step_")) for path in candidates(folder / "checkpoints")]


@pytest.mark.faults
def test_all_processes_killed_before_the_checkpoint_has_its_name_go_on_from_the_one_before(data, tmp_path, whole):
    """Row 3: launcher and ranks, as where the power fails."""
    folder = tmp_path / "run"
    ended = launch(data, folder, TENSOR, fault="killall@step:8,rank:0,at:rename")
    assert (ended.code, ended.outcome) == (-9, {})
    assert steps_of(folder) == [4]
    again = launch(data, folder, TENSOR)
    assert partials_in(again) == 1
    assert (again.code, again.outcome["code"]) == (0, 0), again.output
    assert_ends_like(folder, whole(TENSOR))


def partials_in(ended: Ended) -> int:
    """Unfinished checkpoints of which the output tells."""
    return len(re.findall(r"passed over: \S+/step_\d+\.partial-\w+: is not finished", ended.output))


@pytest.mark.faults
def test_all_processes_killed_at_every_point_of_a_save_lose_no_more_than_the_interval(data, tmp_path, whole):
    """Row 3: six kills of one run, each recovered from by the same command, the last bits as without."""
    folder = tmp_path / "run"
    given = (DATA, "run.save_every=2")
    for place, step, kept in EVERYTHING_DIES:
        ended = launch(data, folder, *given, fault=f"killall@step:{step},rank:0,at:{place}")
        assert ended.code == -9, ended.output
        assert max(steps_of(folder), default=0) == kept
        done = max((int(row["step"]) for row in records(folder, "step")), default=0)
        assert step <= done <= kept + 2 + 2, "one interval, and what was done while the thread saved"
    last = launch(data, folder, *given)
    assert last.outcome["code"] == 0, last.output
    assert "step_00000010, step 10" in last.output
    assert partials(folder / "checkpoints") == []
    assert_ends_like(folder, whole(*given))


FULL = "file=20000@step:6,until:10,rank:1"


def assert_tells_of_no_room(text: str, folder: Path) -> None:
    path = folder / "checkpoints" / r"step_00000008\.partial-\w+" / r"rank_00001\.safetensors"
    assert re.search(rf"{path}: cannot be written: .*File too large.*; it needs [\d.]+ kB, and .* are free", text)


@pytest.mark.parametrize("background", [pytest.param("true", marks=pytest.mark.faults), "false"])
def test_a_disk_without_room_stops_the_run_and_the_old_checkpoint_stands(data, tmp_path, whole, background):
    """Row 6: the message within a second of the save, with path, need and free space."""
    folder = tmp_path / "run"
    given = (DATA, f"run.save_in_background={background}")
    ended = on_a_quiet_machine(
        lambda: launch(data, folder, *given, fault=FULL),
        lambda ended: ended.seconds_to_detect <= 1,
        anew=folder,
    )
    assert ended.outcome["code"] == ExitCode.CANNOT_WRITE, ended.output
    assert_tells_of_no_room(ended.outcome["cause"], folder)
    assert_tells_of_no_room(ended.output, folder)
    assert ended.outcome["checkpoint"].endswith("step_00000004")
    assert ended.seconds_to_detect <= 1
    assert (steps_of(folder), pointed(folder / "checkpoints")) == ([4], "step_00000004")
    assert partials(folder / "checkpoints") == [], "what was begun takes no room"
    assert launch(data, folder, *given).outcome["code"] == 0
    assert_ends_like(folder, whole(DATA))


@pytest.mark.faults
@pytest.mark.parametrize("background", ["true", "false"])
def test_a_run_that_may_go_on_without_a_checkpoint_saves_the_next_one(data, tmp_path, whole, background):
    """Row 6: told, and tried again when the next is due."""
    folder = tmp_path / "run"
    given = (DATA, f"run.save_in_background={background}", "run.save_failure=continue")
    ended = launch(data, folder, *given, fault=FULL)
    assert (ended.code, ended.outcome["code"]) == (0, 0), ended.output
    assert_tells_of_no_room(ended.output, folder)
    assert "training goes on; the next checkpoint is tried when it is due" in ended.output
    assert steps_of(folder) == [12, 4]
    assert_ends_like(folder, whole(DATA))


@pytest.mark.faults
def test_a_run_whose_last_save_fails_has_not_finished(data, tmp_path, whole):
    """Row 6: whatever `run.save_failure` says; nothing but the steps since the last checkpoint is done again."""
    folder = tmp_path / "run"
    given = (DATA, "run.save_failure=continue")
    ended = launch(data, folder, *given, fault="file=20000@step:6,until:99,rank:1")
    assert ended.outcome["code"] == ExitCode.CANNOT_WRITE, ended.output
    assert "step_00000012.partial" in ended.outcome["cause"]
    assert ended.output.count("not saved: ") == 2, "of step 8, and of step 12, which is tried once more"
    assert len(records(folder, "step")) == 12
    assert steps_of(folder) == [4]
    assert launch(data, folder, *given).outcome["code"] == 0
    assert_ends_like(folder, whole(DATA))


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system with room for one checkpoint of 90 kB, of which up to 370 kB are asked for before."""
    with mounted(tmp_path, size="420k") as disk:
        yield disk


@pytest.mark.faults
def test_a_disk_that_is_too_small_is_noticed_before_the_first_byte(data, small_disk):
    """Row 6: no room for the second checkpoint beside the first."""
    folder = small_disk / "run"
    ended = launch(data, folder, DATA)
    assert ended.outcome["code"] == ExitCode.CANNOT_WRITE, ended.output
    told = r"step_\d+\.partial-\w+: cannot be written: the disk is too full; it needs .* are free"
    assert re.search(told, ended.outcome["cause"])
    assert ended.outcome["checkpoint"].endswith("step_00000004")
    assert steps_of(folder) == [4]
    tensors_of(folder, 4)


@pytest.mark.faults
@pytest.mark.parametrize(("at", "background", "layout"), [
    ("write", "true", PIPELINE), ("commit", "true", DATA), ("write", "false", TENSOR),
])  # fmt: skip
def test_an_exception_in_the_thread_that_saves_is_raised_at_the_next_step(data, tmp_path, at, background, layout):
    """Row 18: within a step, with its own name; the pointer has not moved."""
    folder = tmp_path / "run"
    given = (layout, f"run.save_in_background={background}")
    rank = 1 if at == "write" else 0
    slow = "slow=0.2@step:8,until:12,at:optimizer"  # so that the thread has failed before the step has ended
    ended = launch(data, folder, *given, fault=f"fail@step:8,rank:{rank},at:{at};{slow}")
    assert ended.code != 0
    # Whoever tells it first: the rank of the thread a bug, the other one that its checkpoint cannot be written.
    assert ended.outcome["code"] in (ExitCode.BUG, ExitCode.CANNOT_WRITE), ended.output
    assert "a fault in the thread that saves" in ended.outcome["cause"]
    assert "RuntimeError: a fault in the thread that saves" in ended.output
    assert len(records(folder, "step")) == (9 if background == "true" else 8)
    assert (steps_of(folder), pointed(folder / "checkpoints")) == ([4], "step_00000004")
    tensors_of(folder, 4)
