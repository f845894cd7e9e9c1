"""Killed at any point of a save, by SIGKILL: the newest whole checkpoint is found, and the next save cleans up."""

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_bert_tp.checkpoint.choose import newest_whole
from megatron_bert_tp.checkpoint.directories import partials
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.parallel.agreement import Agreement
from tests.checkpoint.killed import save_as_ranks
from tests.sources import ROOT

ALONE = Agreement.alone()
Killer = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def kill() -> Iterator[Killer]:
    """``kill("point", 3, root, step)``: how the process ended, and before what."""
    command = [sys.executable, "-m", "tests.checkpoint.killed"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"

        def ask(*words: object) -> tuple[int, str]:
            print(*words, file=server.stdin, flush=True)
            code, event = json.loads(server.stdout.readline())
            return code, event

        yield ask
        server.stdin.close()


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def assert_holds(checkpoint: Checkpoint, step: int, length: int) -> None:
    """The numbers that all ranks gave for that step."""
    expected = torch.tensor([[1000.0 * rank + step] for rank in range(3)]).expand(3, length)
    assert torch.equal(checkpoint.read("weight/a", (0, 0), (3, length)), expected)


@pytest.mark.parametrize("step", [2, 1])
def test_a_kill_before_any_change_to_a_file_leaves_a_whole_checkpoint(kill, tmp_path, step):
    """A new step, and one that is saved again; in both an old one is removed at the end."""
    events: list[str] = []
    number, code = 0, -signal.SIGKILL
    while code:
        root = tmp_path / str(number)
        save_as_ranks(root, 1, length=10)
        code, event = kill("point", number, root, step)
        assert code in (0, -signal.SIGKILL)
        events.append(event)
        choice = newest_whole(root, ALONE)
        assert choice.checkpoint is not None
        assert choice.checkpoint.step in (1, step)
        assert_holds(choice.checkpoint, choice.checkpoint.step, 10)
        for partial in partials(root):
            assert f"{partial}: is not finished" in choice.skipped
        save_as_ranks(root, 3, length=10)
        assert names(root) == ["latest", "step_00000003"]
        number += 1
    assert events.pop() == ""
    kinds = [event.split()[0] for event in events]
    assert len(events) > 30
    assert {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.fsync"} == set(kinds)
    # Ranks write at the same time, so which of their files is met differs from run to run.
    named = {Path(event.split()[1]).name for event in events}
    assert {"manifest.json", "latest.new"} <= named
    assert any(name.endswith(".safetensors") for name in named)


def killed_at_random(kill: Killer, root: Path, number: int) -> None:
    """Kill that often while saving goes on; each time there is a whole one, and never an older one than before."""
    draw, newest = random.Random(5), 1
    save_as_ranks(root, newest, length=500_000)
    for _ in range(number):
        code, _ = kill("after", draw.uniform(0.0, 0.15), root, newest + 1)
        assert code == -signal.SIGKILL
        choice = newest_whole(root, ALONE)
        assert choice.checkpoint is not None
        assert choice.checkpoint.step >= newest
        newest = choice.checkpoint.step
        assert_holds(choice.checkpoint, newest, 500_000)
    save_as_ranks(root, newest + 1, length=10)
    assert names(root) == ["latest", f"step_{newest + 1:08d}"]


def test_ten_kills_at_random_times_leave_a_whole_checkpoint(kill, tmp_path):
    killed_at_random(kill, tmp_path, 10)


@pytest.mark.faults
def test_fifty_kills_at_random_times_leave_a_whole_checkpoint(kill, tmp_path):
    killed_at_random(kill, tmp_path, 50)
