"""Signals to the whole process group leave the processes that make batches at work, and end none too late."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.sources import ROOT

# Each batch is the number of the process that made it.
SCRIPT = """
import os, signal, sys, time
from megatron_bert_tp.data.loader import Loading, StepLoader

SECONDS = float(sys.argv[1])

def make(number):
    if number > 0:
        time.sleep(SECONDS)
    return [os.getpid()]

def main():
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(each, lambda *_: None)
    loading = Loading(num_workers=1, pins_memory=False, timeout_seconds=60)
    loader = StepLoader(make, size_of=lambda done: 1, end=5, loading=loading)
    print("starting", flush=True)
    print(*loader.take(0), flush=True)
    sys.stdin.readline()
    for step in range(1, int(sys.argv[2])):
        print(*loader.take(step), flush=True)
    print("blocked" if signal.pthread_sigmask(signal.SIG_BLOCK, ()) else "free", flush=True)

if __name__ == "__main__":
    main()
"""
GROUP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture
def start(tmp_path):
    processes = []
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def run(seconds: float, steps: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, script, str(seconds), str(steps)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        processes.append(process)
        assert process.stdout.readline() == "starting\n"
        return process

    yield run
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def signal_group(process):
    for number in GROUP_SIGNALS:
        os.killpg(process.pid, number)
        time.sleep(0.05)


def has_ended(worker: int) -> bool:
    try:
        with open(f"/proc/{worker}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for_end(worker: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not has_ended(worker):
        assert time.monotonic() < deadline, f"process {worker} lives on"
        time.sleep(0.05)


def test_signals_to_the_group_lose_no_batch_at_the_start_or_later(start):
    process = start(0.1, 5)
    for _ in range(4):  # while the worker is born, and while it imports torch
        time.sleep(0.3)
        signal_group(process)
    worker = process.stdout.readline()
    signal_group(process)
    output, _ = process.communicate("\n", timeout=60)
    assert output == worker * 4 + "free\n"
    assert process.returncode == 0
    wait_for_end(int(worker), 1)


def test_a_trainer_that_ends_ends_a_worker_that_is_at_work(start):
    process = start(60, 1)
    worker = int(process.stdout.readline())
    started = time.monotonic()
    process.communicate("\n", timeout=30)
    assert process.returncode == 0
    assert time.monotonic() - started < 15  # torch asks for 5 s before it sends SIGTERM
    wait_for_end(worker, 1)


def test_a_worker_outlives_a_killed_trainer_by_seconds_only(start):
    process = start(0.1, 1)
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    wait_for_end(worker, 20)  # torch looks every 5 s
