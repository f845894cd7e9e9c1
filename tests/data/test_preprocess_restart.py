"""Real kills of real processes: the same command again ends with the bytes of a run without a kill."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from megatron_bert_tp.data.corpus import lock
from megatron_bert_tp.data.corpus.lock import only_writer
from megatron_bert_tp.data.corpus.writer import CorpusWriter
from megatron_bert_tp.data.preprocessing.preprocess import preprocess
from megatron_bert_tp.errors import DataError
from tests.data.corpus_reader import PACKERS

# The work takes two seconds or three, in which the test may not be given a core: the run sends itself the signal
# that shall meet it on its way, some seconds after it has saved a new journal with TEXT in it.
RUN = """
import os, signal, sys, threading
from pathlib import Path
from megatron_bert_tp.data.preprocessing import preprocess as module

def act_after(save, journal, seconds, name, text):
    before = journal.read_text() if journal.exists() else ""
    is_over = threading.Event()
    def save_and_act(*given):
        save(*given)
        saved = journal.read_text()
        if saved != before and text in saved and not is_over.is_set():
            is_over.set()
            given = os.getpid(), signal.Signals[name]
            if float(seconds):
                threading.Timer(float(seconds), os.kill, given).start()
            else:
                os.kill(*given)
    return save_and_act

if __name__ == "__main__":
    module.CHUNK = 4000
    seconds, name, text, vocabulary, output, workers, *inputs = sys.argv[1:]
    if name:
        module._save = act_after(module._save, Path(f"{output}.progress.json"), seconds, name, text)
    paths = [Path(path) for path in inputs]
    module.preprocess(paths, Path(vocabulary), Path(output), workers=int(workers), journal_seconds=0.02)
"""
SUFFIXES = ("bin", "idx", "json")


@pytest.fixture
def inputs(tmp_path):
    """Files of several kinds with about 100,000 sentences, some of them of a document over a megabyte."""
    draws = random.Random(5)
    texts = [" ".join(f"w{draws.randrange(5, 99)}" for _ in range(9)) + "." for _ in range(60_000)]
    blocks = ["\n".join(texts[n : n + 7]) for n in range(0, len(texts), 7)]
    (tmp_path / "a.txt").write_text("\n\n".join(blocks[:3000]) + "\n\n" + "\n".join(texts[:30_000]))
    lines = "\n".join(json.dumps({"text": block}) for block in blocks[3000:])
    (tmp_path / "b.jsonl.zst").write_bytes(PACKERS[".zst"](lines.encode()))
    (tmp_path / "c.txt.xz").write_bytes(PACKERS[".xz"]("\n\n".join(blocks[::3]).encode()))
    return [tmp_path / name for name in ("a.txt", "b.jsonl.zst", "c.txt.xz")]


def corpus_bytes(folder, name):
    return [(folder / f"{name}.{suffix}").read_bytes() for suffix in SUFFIXES]


@contextmanager
def process_of(command, **options):
    """A process with its errors in a pipe; it is gone afterwards, also where the test fails."""
    words = [str(word) for word in command]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def run_of(vocabulary, output, workers, inputs, *, name="", after=0.0, text=""):
    """A run that sends itself the signal ``name`` so many seconds after it saved a journal with ``text`` in it."""
    return process_of([sys.executable, "-c", RUN, after, name, text, vocabulary, output, workers, *inputs])


def wait_until_stopped(process):
    """Until a run has sent itself SIGSTOP."""
    found = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert found.si_code == os.CLD_STOPPED


@pytest.mark.parametrize("workers", [1, 2])
def test_kills_at_any_moment_do_not_change_a_byte(tmp_path, vocabulary_file, inputs, workers):
    preprocess(inputs, vocabulary_file, tmp_path / "whole")
    draws = random.Random(workers)
    kills = resumed = 0
    while not (tmp_path / "out.idx").exists() or (tmp_path / "out.progress.json").exists():
        fault = {"name": "SIGKILL", "after": draws.random() * 0.06} if kills < 8 else {}
        with run_of(vocabulary_file, tmp_path / "out", workers, inputs, **fault) as process:
            told = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), told
        kills += process.returncode == -signal.SIGKILL
        resumed += "an earlier run was cut off; goes on after" in told
    assert kills >= 3
    assert resumed >= 3
    assert corpus_bytes(tmp_path, "out") == corpus_bytes(tmp_path, "whole")
    assert sorted(path.name for path in tmp_path.glob("out.*")) == ["out.bin", "out.idx", "out.json"]


def journal_bytes(folder):
    path = folder / "out.progress.json"
    return path.read_bytes() if path.exists() else b""


def wait_until(happened):
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)


def cut_off(folder, vocabulary, inputs):
    """Leave a run that was killed on the way."""
    with run_of(vocabulary, folder / "out", 1, inputs, name="SIGKILL", text='"documents": 2') as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "out.bin").exists()


def test_workers_end_with_a_killed_parent(tmp_path, vocabulary_file, inputs):
    with run_of(vocabulary_file, tmp_path / "out", 2, inputs, name="SIGSTOP") as process:
        wait_until_stopped(process)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        assert len(children) >= 2
        process.kill()
        process.communicate()
    wait_until(lambda: not any(os.path.exists(f"/proc/{child}") for child in children))


def default_interrupt():
    """Shells start background jobs with SIGINT ignored, and children inherit it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupt_says_how_to_go_on_and_keeps_the_progress(tmp_path, vocabulary_file, inputs):
    many = inputs * 5  # some seconds of work
    command = [sys.executable, "-m", "megatron_bert_tp.preprocess", *many, "--tokenizer", vocabulary_file]
    full = [str(word) for word in (*command, "--output", tmp_path / "out")]
    tokens = tmp_path / "out.bin.unfinished"
    with process_of(full, start_new_session=True, preexec_fn=default_interrupt) as process:
        wait_until(lambda: tokens.exists() and tokens.stat().st_size > 300_000)  # the first chunk has 260 kB
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        told = process.communicate()[1]
    assert process.returncode == 130
    assert told.count("\n") == 1
    assert "interrupted; what is done is kept" in told
    again = subprocess.run(full, capture_output=True, text=True, check=True)
    assert "goes on after" in again.stderr
    preprocess(many, vocabulary_file, tmp_path / "whole")
    assert corpus_bytes(tmp_path, "out") == corpus_bytes(tmp_path, "whole")


@pytest.mark.parametrize("change", ["option", "tokenizer", "first input"])
def test_a_changed_request_begins_anew_and_says_why(tmp_path, vocabulary_file, inputs, capsys, change):
    cut_off(tmp_path, vocabulary_file, inputs)
    options = {"lowercase": change != "option"}
    if change == "tokenizer":
        (tmp_path / "v.txt").write_text(vocabulary_file.read_text() + "more\n")
        vocabulary_file = tmp_path / "v.txt"
    if change == "first input":
        inputs[0].write_text("w5 w6. w7.")
    preprocess(inputs, vocabulary_file, tmp_path / "out", **options)
    told = capsys.readouterr().err
    named = {"option": "lowercase", "tokenizer": "tokenizer", "first input": "a.txt"}[change]
    assert "begins anew" in told
    assert named in told
    preprocess(inputs, vocabulary_file, tmp_path / "whole", **options)
    assert corpus_bytes(tmp_path, "out") == corpus_bytes(tmp_path, "whole")


def test_a_mended_file_is_read_again_and_those_before_it_are_not(tmp_path, vocabulary_file, inputs, capsys):
    (tmp_path / "empty.txt").touch()
    inputs = [tmp_path / "empty.txt", *inputs]
    *_, last = inputs
    good = last.read_bytes()
    last.write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match="cut short"):
        preprocess(inputs, vocabulary_file, tmp_path / "out", journal_seconds=0.0)
    assert "the same command again goes on from there" in capsys.readouterr().err
    assert not (tmp_path / "out.bin").exists()
    last.write_bytes(good)
    report = preprocess(inputs, vocabulary_file, tmp_path / "out")
    assert "goes on after" in capsys.readouterr().err
    assert report.run_bytes < report.tally.num_bytes
    preprocess(inputs, vocabulary_file, tmp_path / "whole")
    assert corpus_bytes(tmp_path, "out") == corpus_bytes(tmp_path, "whole")


@pytest.mark.parametrize("damage", ["journal cut", "tokens gone", "lengths cut"])
def test_damaged_progress_begins_anew(tmp_path, vocabulary_file, inputs, capsys, damage):
    cut_off(tmp_path, vocabulary_file, inputs)
    name = {"journal cut": "progress.json", "tokens gone": "bin.unfinished", "lengths cut": "lengths.unfinished"}
    path = tmp_path / f"out.{name[damage]}"
    path.write_bytes(path.read_bytes()[:10])
    preprocess(inputs, vocabulary_file, tmp_path / "out")
    assert "begins anew" in capsys.readouterr().err
    preprocess(inputs, vocabulary_file, tmp_path / "whole")
    assert corpus_bytes(tmp_path, "out") == corpus_bytes(tmp_path, "whole")


def test_two_processes_never_write_the_same_corpus(tmp_path, vocabulary_file, inputs):
    with run_of(vocabulary_file, tmp_path / "out", 1, inputs, name="SIGSTOP") as process:
        wait_until_stopped(process)
        with pytest.raises(DataError, match="another process is writing this corpus now"):
            preprocess(inputs, vocabulary_file, tmp_path / "out")
        process.send_signal(signal.SIGCONT)
        process.communicate()
    assert process.returncode == 0
    preprocess(inputs, vocabulary_file, tmp_path / "whole")
    assert corpus_bytes(tmp_path, "out") == corpus_bytes(tmp_path, "whole")


def test_a_refused_second_process_leaves_the_journal_of_the_first_alone(tmp_path, vocabulary_file, inputs, capsys):
    cut_off(tmp_path, vocabulary_file, inputs)
    before = journal_bytes(tmp_path)
    with only_writer(tmp_path / "out"), pytest.raises(DataError, match="another process is writing"):
        preprocess(inputs, vocabulary_file, tmp_path / "out", lowercase=False)
    assert journal_bytes(tmp_path) == before
    assert "begins anew" not in capsys.readouterr().err


def test_a_lock_file_that_its_owner_removes_is_made_anew(tmp_path, monkeypatch):
    opened, removed = os.open, []

    def open_late(path, *arguments):
        descriptor = opened(path, *arguments)
        if not removed:
            os.unlink(path)
            removed.append(path)
        return descriptor

    monkeypatch.setattr(lock.os, "open", open_late)
    with only_writer(tmp_path / "out"):
        assert (tmp_path / "out.lock.unfinished").exists()
        with pytest.raises(DataError, match="another process"), only_writer(tmp_path / "out"):
            pass
    assert not list(tmp_path.iterdir())


def leave_whole(folder, vocabulary, inputs, monkeypatch):
    """Leave a run that was stopped when only the names of its files were missing."""

    def stop(_writer):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(CorpusWriter, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            preprocess(inputs[:1], vocabulary, folder / "out")


@pytest.mark.parametrize("gone", ["all", "the .json", "half the .bin"])
def test_a_journal_of_a_whole_corpus_whose_files_are_gone_is_not_believed(
    tmp_path, vocabulary_file, inputs, capsys, monkeypatch, gone
):
    leave_whole(tmp_path, vocabulary_file, inputs, monkeypatch)
    assert journal_bytes(tmp_path)
    unfinished = {"all": "out.*", "the .json": "out.json.*", "half the .bin": "out.bin.*"}[gone]
    for path in tmp_path.glob(f"{unfinished}unfinished"):
        if gone == "half the .bin":
            os.truncate(path, path.stat().st_size // 2)
        else:
            path.unlink()
    preprocess(inputs[:1], vocabulary_file, tmp_path / "out")
    assert "begins anew" in capsys.readouterr().err
    preprocess(inputs[:1], vocabulary_file, tmp_path / "whole")
    assert corpus_bytes(tmp_path, "out") == corpus_bytes(tmp_path, "whole")
    assert sorted(path.name for path in tmp_path.glob("out.*")) == ["out.bin", "out.idx", "out.json"]


def test_a_run_that_was_stopped_before_its_files_got_their_names_only_names_them(
    tmp_path, vocabulary_file, inputs, monkeypatch
):
    leave_whole(tmp_path, vocabulary_file, inputs, monkeypatch)
    assert preprocess(inputs[:1], vocabulary_file, tmp_path / "out").run_bytes == 0
    preprocess(inputs[:1], vocabulary_file, tmp_path / "whole")
    assert corpus_bytes(tmp_path, "out") == corpus_bytes(tmp_path, "whole")


def test_a_disk_that_fills_later_keeps_the_progress_and_says_so(tmp_path, vocabulary_file, inputs, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, hard))
    try:
        with pytest.raises(DataError, match="cannot be written"):
            preprocess(inputs, vocabulary_file, tmp_path / "out", journal_seconds=0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the same command again goes on from there" in capsys.readouterr().err
    preprocess(inputs, vocabulary_file, tmp_path / "out")
    assert "goes on after" in capsys.readouterr().err
    preprocess(inputs, vocabulary_file, tmp_path / "whole")
    assert corpus_bytes(tmp_path, "out") == corpus_bytes(tmp_path, "whole")
