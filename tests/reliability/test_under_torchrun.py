"""The watch over real ranks that torchrun has started: how long it takes from a fault to torchrun's end."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.running import end_family
from tests.reliability.launched import LIMITS
from tests.sources import ROOT


@pytest.fixture
def launch(tmp_path):
    launched = []

    def run(what: str) -> subprocess.Popen[str]:
        command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "tests.reliability.launched", what]
        with (tmp_path / "errors").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        launched.append(process)
        return process

    yield run
    for process in launched:
        if process.poll() is None:
            end_family(process.pid)  # ranks that live on would keep the pipe open
        process.communicate()


def test_a_stopped_rank_ends_torchrun_within_ten_seconds(launch, tmp_path):
    """Without the watchdog's SIGKILL torchrun waits 30 s for a stopped rank."""
    process = launch("stop")
    word, number, stopped = process.stdout.readline().split()
    assert word == "now"
    output, _ = process.communicate(timeout=60)
    assert time.time() - float(stopped) < LIMITS.step + 8
    assert process.returncode == 1  # whatever a rank ends with
    told = re.findall("^told by 0: (.*)$", output, re.MULTILINE)
    assert len(told) == 1
    assert told[0].startswith(f"hang: rank 1 (process {number}) is stopped; its last action, ")
    assert "in step 5: forward of microbatch 0" in told[0]
    errors = (tmp_path / "errors").read_text()
    assert re.search(r"^0 .* running .* adds up gradients$", errors, re.MULTILINE)
    assert re.search(r"^1 .* stopped .* forward of microbatch 0$", errors, re.MULTILINE)
    assert 'launched.py", line' in errors.partition("--- rank 0")[2]  # the stack of the one that lives
    assert not os.path.exists(f"/proc/{number}")


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_stop_by_themselves(launch):
    process = launch("go on")
    process.stdout.readline()
    process.kill()
    started = time.monotonic()
    output, _ = process.communicate(timeout=60)  # until the last rank has closed the pipe
    assert time.monotonic() - started < 5
    assert sorted(output.splitlines()) == [f"rank {rank} stops: the launcher is gone" for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_stops_all_ranks_at_the_same_step(launch, number):
    process = launch("go on")
    process.stdout.readline()
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert sorted(output.splitlines()) == [f"rank {rank} stops: {number.name}" for rank in range(2)]


@pytest.mark.slow
def test_a_second_interruption_of_torchrun_ends_ranks_that_do_not_stop(launch):
    """Torchrun makes a SIGTERM of it."""
    process = launch("never stop")
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    output, _ = process.communicate(timeout=40)
    assert time.monotonic() - started < 5
    assert output == ""
