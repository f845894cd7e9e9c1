"""launch/slurm.sbatch on a SLURM of two nodes, where there is one: signals, codes, the way back into the queue."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_bert_tp.errors import ExitCode
from tests.launch.running import environment, interpreter, wait_for
from tests.sources import ROOT
from tests.training.runs import records

SETTINGS = ROOT / "configs" / "demo.yaml"
LAYOUT = ("parallel.tensor=2", "parallel.pipeline=1")


def ask(*command: object) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


@pytest.fixture(scope="module", autouse=True)
def cluster() -> None:
    try:
        nodes = ask("sinfo", "--noheader", "--format=%D")
    except (FileNotFoundError, subprocess.SubprocessError):
        pytest.skip("no SLURM here")
    if sum(map(int, nodes.split())) < 2:
        pytest.skip("SLURM has one node")


class Job:
    """One job of two processes on two nodes."""

    def __init__(self, folder: Path, settings: object, *overrides: str, python: object, **variables: str) -> None:
        self.run, self.log = folder / "run", folder / "log"
        command = ["sbatch", "--parsable", "--nodes=2", f"--output={self.log}", "--chdir", str(folder)]
        command += [str(ROOT / "launch" / "slurm.sbatch"), str(settings), f"run.directory={self.run}", *overrides]
        given = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PROCESSES_PER_NODE": "1"}
        done = subprocess.run(
            command, env=environment(python, **given, **variables), capture_output=True, text=True, check=True
        )
        self.number = done.stdout.strip()

    def facts(self) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", ask("scontrol", "show", "job", self.number)))

    def end(self) -> tuple[str, int]:
        """State and exit code, when it has ended."""
        wait_for(lambda: self.facts()["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), seconds=120)
        facts = self.facts()
        return facts["JobState"], int(facts["ExitCode"].partition(":")[0])

    def signals(self) -> list[set[str]]:
        return [set((self.run / f"signals.{rank}").read_text().split()) for rank in range(2)]

    def wait_until_ready(self) -> None:
        wait_for(lambda: all((self.run / f"ready.{rank}").exists() for rank in range(2)), seconds=120)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["scancel", self.number], capture_output=True, check=False)
        wait_for(lambda: not ask("squeue", "--noheader", f"--jobs={self.number}"), seconds=60)


@pytest.fixture
def stand_in(tmp_path) -> Path:
    return interpreter(tmp_path)


def test_a_finished_job_ends_with_0(tmp_path, stand_in):
    with Job(tmp_path, SETTINGS, *LAYOUT, python=stand_in, STAND_IN="finish") as job:
        assert job.end() == ("COMPLETED", 0)


def test_a_failed_job_ends_with_the_code_that_a_rank_has_written(tmp_path, stand_in):
    with Job(tmp_path, SETTINGS, *LAYOUT, python=stand_in, STAND_IN="fail") as job:
        assert job.end() == ("FAILED", ExitCode.HANG)


def test_bad_settings_end_a_job_before_a_process_is_started(tmp_path, stand_in):
    with Job(tmp_path, SETTINGS, "parallel.tensor=4", python=stand_in, STAND_IN="finish") as job:
        assert job.end() == ("FAILED", ExitCode.BAD_SETTINGS)
    assert "must be a multiple of 8" in job.log.read_text()


@pytest.mark.parametrize(
    ("options", "state"),
    [
        (("--batch", "--signal=USR1"), "FAILED"),  # what `#SBATCH --signal=B:USR1@180` does
        (("--signal=USR1",), "FAILED"),  # and what it does without `B:`
        (("--batch", "--signal=INT"), "FAILED"),
        (("--batch", "--signal=TERM"), "FAILED"),
        ((), "CANCELLED"),
    ],
    ids=["warning", "warning-to-steps", "INT", "TERM", "cancelled"],
)
def test_a_signal_reaches_the_ranks_of_all_nodes_and_the_save_is_waited_for(tmp_path, stand_in, options, state):
    with Job(tmp_path, SETTINGS, *LAYOUT, python=stand_in, STAND_IN="obey") as job:
        job.wait_until_ready()
        ask("scancel", *options, job.number)
        assert job.end() == (state, ExitCode.STOPPED)
        assert all(("SIGTERM" if state == "CANCELLED" else "SIGUSR1") in heard for heard in job.signals())


def test_a_job_that_is_warned_goes_back_into_the_queue_and_finishes(tmp_path, data):
    overrides = ("parallel.tensor=2", "run.requeue=true", "optimizer.steps=60", "run.save_every=1000")
    with Job(tmp_path, data, *overrides, python=sys.executable) as job:
        wait_for(lambda: (job.run / "metrics.jsonl").exists() and len(records(job.run, "step")) > 3, seconds=120)
        ask("scancel", "--batch", "--signal=USR1", job.number)
        wait_for(lambda: job.facts()["Restarts"] == "1", seconds=120)
        # SLURM lets a job that was put back wait for two minutes; this has it start at once.
        wait_for(lambda: job.facts()["JobState"] == "PENDING", seconds=60)
        time.sleep(1)
        subprocess.run(["scontrol", "update", f"job={job.number}", "starttime=now"], check=False)
        assert job.end() == ("COMPLETED", 0)
    assert [row["step"] for row in records(job.run, "step")] == list(range(1, 61)), "each step once"
