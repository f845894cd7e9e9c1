"""The shared memory of the ranks of a host, with real processes that write, stop and die."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.reliability.actions import Kind
from megatron_bert_tp.reliability.board import Board, board_of_host
from megatron_bert_tp.reliability.process_state import Process, ProcessState
from megatron_bert_tp.reliability.slot import State
from tests.sources import ROOT

WRITER = """
import sys
from pathlib import Path
from megatron_bert_tp.reliability.actions import Kind
from megatron_bert_tp.reliability.board import Board
board = Board.open(Path(sys.argv[1]), size=2, rank=5, local_rank=1)
print("ready", flush=True)
sys.stdin.readline()
step = 0
while True:
    step += 1
    board.show(Kind(step % 13), f"{step} " * (step % 40), step)
    board.beat()
"""


@pytest.fixture
def board(tmp_path):
    return Board.create(tmp_path / "board", size=2, rank=4)


@pytest.fixture
def writer(tmp_path, board):
    assert board.peers() == []
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path / "board"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


def test_what_one_process_shows_another_sees(board, tmp_path):
    peer = Board.open(tmp_path / "board", size=2, rank=5, local_rank=1)
    peer.show(Kind.OPTIMIZER, "moves the weights", 33)
    peer.state = State.FAILING
    (row,) = board.peers()
    assert (row.rank, row.state, row.process) == (5, State.FAILING, Process.own())
    action = row.action
    assert (action.step, action.kind, action.what) == (33, Kind.OPTIMIZER, "moves the weights")
    assert 0 <= time.monotonic() - action.time < 1
    assert [each.rank for each in peer.peers()] == [4]
    assert board.own().rank == 4


def test_a_place_that_nobody_has_taken_is_no_peer(board):
    assert board.peers() == []
    assert board.missing() is None


@pytest.mark.parametrize("text", ["é" * 200, "a" + "é" * 200, "x" * 200, "x" * 201, ""])
def test_long_texts_are_cut_to_200_bytes_and_never_within_a_character(board, text):
    board.show(Kind.FORWARD, text, 1)
    seen = board.own().action.what
    assert text.startswith(seen)
    assert len(seen.encode()) >= min(len(text.encode()), 199)
    assert len(seen.encode()) <= 200


def test_a_reader_never_sees_half_an_action(board, writer):
    """The writer's step, kind and text depend on each other."""
    go(writer)
    steps = set()
    deadline = time.monotonic() + 30
    while len(steps) < 500 and time.monotonic() < deadline:
        (row,) = board.peers()
        action = row.action
        if action.step:
            assert action.kind == action.step % 13
            assert f"{action.step} " * (action.step % 40) == action.what or len(action.what) >= 199
            steps.add(action.step)
    assert len(steps) == 500


def test_the_last_whole_action_of_a_writer_that_was_stopped_half_way_is_seen(board):
    board.show(Kind.FORWARD, "before", 1)
    board.show(Kind.BACKWARD, "after", 2)
    half = board._own._records[board._own._count & 1] + 10
    board._memory[half] ^= 0xFF
    assert board.own().action.what == "before"


def test_the_state_of_a_process_is_that_of_the_system(board, writer):
    (row,) = board.peers()
    assert row.process.state is ProcessState.RUNNING
    assert board.missing() is None
    writer.send_signal(signal.SIGSTOP)
    wait_for(row.process, ProcessState.STOPPED)
    assert board.missing() is None
    writer.send_signal(signal.SIGKILL)
    wait_for(row.process, ProcessState.GONE)  # a zombie: nobody has collected it
    assert board.missing() == f"rank 5 (process {writer.pid})"
    writer.wait()
    assert board.missing() == f"rank 5 (process {writer.pid})"


def wait_for(process, state):
    deadline = time.monotonic() + 5
    while process.state is not state:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_that_ended_in_order_is_not_missing(board, writer):
    peer = board._slots[1]
    peer.state = State.ENDED
    writer.kill()
    writer.wait()
    assert board.missing() is None


def test_a_number_that_belongs_to_another_process_now_is_neither_seen_nor_killed():
    own = Process.own()
    other = Process(own.number, own.started - 100)
    assert own.state is ProcessState.RUNNING
    assert other.state is ProcessState.GONE
    assert not other.kill()


def test_one_rank_alone_is_the_first(board, tmp_path):
    code = f"""
from pathlib import Path
from megatron_bert_tp.reliability.board import Board
board = Board.open(Path({str(tmp_path / "board")!r}), size=2, rank=5, local_rank=1)
print(board.is_first(), board.is_first())
"""
    assert board.is_first()
    assert board.is_first()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


@pytest.mark.usefixtures("board")
def test_a_file_that_is_no_board_of_this_size_is_refused(tmp_path):
    with pytest.raises(OSError, match="no board for 3 ranks"):
        Board.open(tmp_path / "board", size=3, rank=1, local_rank=1)
    (tmp_path / "other").write_bytes(bytes(os.stat(tmp_path / "board").st_size))
    (tmp_path / "other").chmod(0o600)
    with pytest.raises(OSError, match="no board"):
        Board.open(tmp_path / "other", size=2, rank=1, local_rank=1)
    (tmp_path / "link").symlink_to(tmp_path / "board")
    with pytest.raises(OSError, match="symbolic"):
        Board.open(tmp_path / "link", size=2, rank=1, local_rank=1)
    (tmp_path / "board").chmod(0o644)
    with pytest.raises(OSError, match="no board"):
        Board.open(tmp_path / "board", size=2, rank=1, local_rank=1)


@pytest.mark.usefixtures("board")
def test_a_board_is_private(tmp_path):
    assert (tmp_path / "board").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        Board.create(tmp_path / "board", size=2, rank=0)


def share(local_world_size):
    agreement = Agreement.of_world(timedelta(seconds=60))
    board = board_of_host(
        agreement, local_rank=agreement.rank % local_world_size, local_world_size=local_world_size
    )
    board.show(Kind.DATA, f"of {agreement.rank}", agreement.rank)
    agreement.wait()
    seen = sorted((row.rank, row.action.what) for row in board.peers())
    agreement.wait()
    # This board's own name, as the kernel has it: other processes have boards beside it.
    return board.is_shared, seen, os.readlink(f"/proc/self/fd/{board._descriptor}")


def test_the_ranks_of_a_host_share_a_board_whose_name_is_gone(ranks):
    found = ranks.run(4, share, 4)
    assert [answer[:2] for answer in found] == [
        (True, [(r, f"of {r}") for r in range(4) if r != rank]) for rank in range(4)
    ]
    (name,) = {name for _, _, name in found}
    assert Path(name).name.startswith("megatron_bert_tp-")
    assert name.endswith(" (deleted)")


def test_two_launchers_on_one_host_have_boards_of_their_own(ranks):
    found = ranks.run(4, share, 2)
    assert [answer[:2] for answer in found] == [(True, [(other, f"of {other}")]) for other in (1, 0, 3, 2)]


def test_one_process_has_a_board_for_itself():
    board = board_of_host(Agreement.alone(), local_rank=0, local_world_size=1)
    assert not board.is_shared
    assert board.peers() == []
    assert board.is_first()
