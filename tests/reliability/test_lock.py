"""Two jobs never write into one folder, and a job that was killed leaves no lock."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_bert_tp.errors import DirectoryError, ExitCode
from megatron_bert_tp.reliability import lock
from megatron_bert_tp.reliability.lock import NAME, DirectoryLock

HOLDER = """
import sys, time
from pathlib import Path
from megatron_bert_tp.reliability.lock import DirectoryLock

with DirectoryLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


class FakeTime:
    """Stands in for the module ``time``: nothing passes but what is slept."""

    def __init__(self) -> None:
        self.slept = 0.0

    def monotonic(self) -> float:
        return self.slept

    def sleep(self, seconds: float) -> None:
        self.slept += seconds


@contextmanager
def held_by_another_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def refusal(folder: Path) -> str:
    with pytest.raises(DirectoryError) as caught, DirectoryLock(folder):
        pass
    assert caught.value.exit_code == ExitCode.CANNOT_WRITE
    return str(caught.value)


def test_the_second_job_is_refused_after_half_a_second_and_told_who_holds_the_folder(tmp_path, monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr(lock, "time", fake)
    with held_by_another_process(tmp_path) as holder:
        message = refusal(tmp_path)
        assert 0.5 <= fake.slept <= 0.6
        assert f"process {holder.pid} on {socket.gethostname()}, since 20" in message
        assert "another run.directory" in message
        # The one that was refused has left the holder's name alone.
        assert json.loads((tmp_path / NAME).read_text())["pid"] == holder.pid


def test_a_job_that_is_killed_leaves_no_lock(tmp_path):
    with held_by_another_process(tmp_path) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
        with DirectoryLock(tmp_path):
            assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_holder_that_is_just_ending_is_waited_for(tmp_path, monkeypatch):
    # Half a second is not enough for a kill after 0.2 s where the cores are busy.
    monkeypatch.setattr(lock, "_PATIENCE", 30)
    with (
        held_by_another_process(tmp_path) as holder,
        subprocess.Popen(["sh", "-c", f"sleep 0.2; kill -9 {holder.pid}"]),
        DirectoryLock(tmp_path),
    ):
        assert holder.wait(10) == -signal.SIGKILL


def test_the_lock_is_let_go_at_the_end_and_its_file_stays(tmp_path):
    with DirectoryLock(tmp_path):
        assert "belongs to another job" in refusal(tmp_path)
    with DirectoryLock(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_the_file_is_the_users_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        with DirectoryLock(tmp_path):
            assert stat.S_IMODE((tmp_path / NAME).stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_a_child_of_the_holder_that_runs_on_does_not_hold_it(tmp_path):
    holder = DirectoryLock(tmp_path).__enter__()
    with subprocess.Popen(["sleep", "60"], close_fds=False) as child:
        holder.__exit__()
        try:
            with DirectoryLock(tmp_path):
                pass
        finally:
            child.kill()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"host": 1}', b"[" * 4096, b"\0" * 9000])
def test_whatever_the_file_holds_the_refusal_is_one_message(tmp_path, content):
    with DirectoryLock(tmp_path):
        (tmp_path / NAME).write_bytes(content)
        assert "its lock does not say which" in refusal(tmp_path)


def test_no_control_characters_of_another_user_reach_the_terminal(tmp_path):
    with DirectoryLock(tmp_path):
        (tmp_path / NAME).write_text(json.dumps({"host": "a\x1b[2J", "pid": 1, "since": "now"}))
        assert re.fullmatch(r"[ -~]*", refusal(tmp_path))


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / NAME).symlink_to(victim)
    assert "cannot be opened" in refusal(folder)
    assert victim.read_text() == "precious"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    assert f"{tmp_path}/none/lock: cannot be opened (No such file" in refusal(tmp_path / "none")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_the_file_system_has_no_locks_one_line_says_so_and_the_run_goes_on(tmp_path, monkeypatch, code):
    """Such a file system cannot be made here, so the kernel's answer is a stand-in."""

    def unsupported(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    lines: list[str] = []
    with DirectoryLock(tmp_path, say=lines.append), DirectoryLock(tmp_path, say=lines.append):
        pass
    assert len(lines) == 2
    assert lines[0].startswith(f"warning: the file system of {tmp_path} has no locks (")
    assert "\n" not in lines[0]
