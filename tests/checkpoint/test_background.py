"""Saving goes on while the run does: what is written is what was there, and what fails is heard."""

import subprocess
import sys
import threading
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from megatron_bert_tp.checkpoint.background import Saver, snapshot
from megatron_bert_tp.checkpoint.choose import newest_whole
from megatron_bert_tp.checkpoint.directories import Keep, latest_checkpoint
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.checkpoint.slices import Rectangle
from megatron_bert_tp.errors import SaveError
from megatron_bert_tp.parallel.agreement import Agreement
from tests.sources import ROOT
from tests.support import TIMEOUT

NOTHING = {"facts": {}, "attachments": {}}


@dataclass
class Gate:
    """One rank alone, whose messages wait until they are let through."""

    rank: int = 0
    size: int = 1
    opened: threading.Event = field(default_factory=threading.Event)

    def texts(self, text: str | None) -> list[str | None]:
        assert self.opened.wait(30)
        return [text]


def saver(root: Path, agreement: Gate | Agreement, *, in_background: bool = True) -> Saver:
    return Saver(root, agreement, keep=Keep(last=2), in_background=in_background)


def rectangle(tensor: torch.Tensor) -> Rectangle:
    return Rectangle("weight/a", tuple(tensor.shape), (0,) * tensor.dim(), tensor)


def read(root: Path) -> torch.Tensor:
    return Checkpoint.open(root).read("weight/a", (0,), (4,))


@pytest.mark.parametrize("in_background", [False, True])
def test_what_was_saved_is_told_once(tmp_path, in_background):
    saves = saver(tmp_path, Agreement.alone(), in_background=in_background)
    assert saves.finish() is None
    saves.begin(3, [rectangle(torch.arange(4.0))], facts={"samples": 7}, attachments={})
    saved = saves.finish()
    assert saved is not None
    assert (saved.path, saved.num_bytes) == (tmp_path / "step_00000003", 16)
    assert saved.seconds > 0
    assert saves.finish() is None
    assert torch.equal(read(tmp_path), torch.arange(4.0))


def test_what_is_written_is_what_the_tensors_and_facts_held_when_it_began(tmp_path):
    gate, tensor, facts = Gate(), torch.arange(4.0), {"seen": [1]}
    saves = saver(tmp_path, gate)
    saves.begin(3, [rectangle(tensor)], facts=facts, attachments={})
    tensor.mul_(100)
    facts["seen"].append(2)
    assert saves.is_busy
    assert latest_checkpoint(tmp_path) is None
    gate.opened.set()
    saves.finish()
    assert not saves.is_busy
    assert torch.equal(read(tmp_path), torch.arange(4.0))
    assert Checkpoint.open(tmp_path).facts == {"seen": [1]}


def test_in_the_foreground_all_is_done_when_it_returns_and_nothing_is_copied(tmp_path):
    saves = saver(tmp_path, Agreement.alone(), in_background=False)
    saves.begin(3, [rectangle(torch.arange(4.0))], **NOTHING)
    assert not saves.is_busy
    assert torch.equal(read(tmp_path), torch.arange(4.0))


def test_what_an_earlier_kill_left_is_told(tmp_path):
    (tmp_path / "step_00000002.partial-0123abcd").mkdir()
    saves = saver(tmp_path, Agreement.alone())
    saves.begin(3, [rectangle(torch.arange(4.0))], **NOTHING)
    saved = saves.finish()
    assert saved is not None
    assert saved.cleared == (f"removed {tmp_path}/step_00000002.partial-0123abcd, which was not finished",)


@pytest.mark.parametrize("in_background", [False, True])
def test_an_error_is_raised_at_the_end_the_pointer_stays_and_the_next_save_works(tmp_path, in_background):
    saves = saver(tmp_path, Agreement.alone(), in_background=in_background)
    saves.begin(3, [rectangle(torch.arange(4.0))], **NOTHING)
    saves.finish()
    saves.begin(6, [rectangle(torch.zeros(4))], facts={}, attachments={"words": tmp_path / "missing"})
    with pytest.raises(SaveError, match="missing"):
        saves.finish()
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000003"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000003"]
    saves.begin(9, [rectangle(torch.ones(4))], **NOTHING)
    assert saves.finish() is not None
    assert torch.equal(read(tmp_path), torch.ones(4))


def test_a_bug_in_the_thread_is_raised_at_the_end_with_its_traceback(tmp_path):
    saves = saver(tmp_path, Agreement.alone())
    saves.begin(3, [rectangle(torch.arange(4.0))], facts={"no json": Path()}, attachments={})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="not JSON serializable") as raised:
        saves.finish()
    assert "commit_checkpoint" in {frame.name for frame in traceback.extract_tb(raised.value.__traceback__)}
    assert list(tmp_path.iterdir()) == []


def test_one_save_at_a_time(tmp_path):
    gate = Gate()
    saves = saver(tmp_path, gate)
    saves.begin(3, [rectangle(torch.arange(4.0))], **NOTHING)
    with pytest.raises(AssertionError, match="call finish first"):
        saves.begin(4, [rectangle(torch.arange(4.0))], **NOTHING)
    gate.opened.set()
    saves.finish()


def test_a_snapshot_shares_no_memory_and_stands_in_one_piece():
    tensors = [torch.randn(4, 6).T, torch.randn(8)[2:5], torch.tensor(3)]
    copies = snapshot([rectangle(tensor) for tensor in tensors])
    for tensor, copied in zip(tensors, copies, strict=True):
        assert torch.equal(copied.tensor, tensor)
        assert copied.tensor.is_contiguous()
        assert copied.tensor.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


END_WHILE_SAVING = """
import sys, time
from pathlib import Path
import torch
from megatron_bert_tp.checkpoint.background import Saver
from megatron_bert_tp.checkpoint.directories import Keep
from megatron_bert_tp.checkpoint.slices import Rectangle

class Slow:
    rank, size = 0, 1
    def texts(self, text):
        time.sleep(0.3)
        return [text]

saver = Saver(Path(sys.argv[1]), Slow(), keep=Keep(last=1), in_background=True)
saver.begin(3, [Rectangle("weight/a", (4,), (0,), torch.arange(4.0))], facts={}, attachments={})
sys.exit("the run fails")
"""


def test_a_process_that_ends_finishes_what_it_has_begun(tmp_path):
    """Also where that begins a thread of its own after the main thread has ended."""
    command = [sys.executable, "-c", END_WHILE_SAVING, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (1, "the run fails\n")
    assert torch.equal(read(tmp_path), torch.arange(4.0))


def save_while_talking(root: Path) -> tuple[str, int]:
    """Saves in the background while the ranks use another communicator."""
    main, own = Agreement.of_world(TIMEOUT), Agreement.of_world(TIMEOUT)
    mine = Rectangle("weight/a", (4,), (2 * main.rank,), torch.full((2,), float(main.rank)))
    saves, messages = saver(root, own), 0
    saves.begin(5, [mine], **NOTHING)
    while main.maximum([saves.is_busy])[0]:
        messages += 1
    saved = saves.finish()
    assert saved is not None
    assert newest_whole(root, main).checkpoint is not None
    return str(saved.path), messages


def test_ranks_talk_while_their_threads_save(tmp_path, ranks):
    (one, _), (other, _) = ranks.run(2, save_while_talking, tmp_path)
    assert one == other == str(tmp_path / "step_00000005")
    assert torch.equal(read(tmp_path), torch.tensor([0.0, 0.0, 1.0, 1.0]))
