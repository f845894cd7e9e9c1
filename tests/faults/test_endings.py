"""Ends that meet something else: a save, an evaluation, a console that goes away, SLURM's queue."""

import os
import subprocess
import time

import pytest

from megatron_bert_tp.errors import ExitCode
from tests.faults.runs import command, environment, launch, outcome_of, tensors_of
from tests.training.runs import ROOT, records

DATA = ()
EVALUATED = ("run.evaluation_samples=8", "run.evaluate_every=4")


@pytest.mark.faults
def test_a_stop_in_an_evaluation_waits_for_a_save_that_is_longer_than_a_step_may_be(data, tmp_path):
    """The save of step 4 takes 6 s, and a step may be silent for 3."""
    folder = tmp_path / "run"
    faults = "slow=6@step:4,rank:0,at:write;term@step:4,rank:1,at:evaluate"
    ended = launch(data, folder, *EVALUATED, "run.step_timeout_seconds=3", fault=faults)
    assert ended.outcome["code"] == ExitCode.STOPPED, ended.output
    assert ended.outcome["checkpoint"].endswith(f"step_{records(folder, 'step')[-1]['step']:08d}")


@pytest.mark.faults
def test_a_flipped_bit_is_found_before_a_stop_saves_it(data, tmp_path):
    folder = tmp_path / "run"
    ended = launch(data, folder, fault="flip@step:6,rank:0,at:after;term@step:6,rank:1")
    assert ended.outcome["code"] == ExitCode.RANKS_DIFFER, ended.output
    assert ended.outcome["checkpoint"].endswith("step_00000004")
    assert tensors_of(folder)


@pytest.mark.faults
def test_the_job_goes_back_into_the_queue_while_all_ranks_are_there(data, tmp_path):
    """A scontrol that takes its time: torchrun ends the others when the first rank has gone."""
    tools = tmp_path / "bin"
    tools.mkdir()
    done = tmp_path / "done"
    (tools / "scontrol").write_text(f'#!/bin/sh\nsleep 3\necho "$@" > {done}\n')
    (tools / "scontrol").chmod(0o755)
    folder = tmp_path / "run"
    given = (f"run.directory={folder}", "run.requeue=true")
    finished = subprocess.run(
        command(data, *given, processes=2),
        cwd=ROOT,
        env={
            **environment("usr1@step:6,rank:1"), "SLURM_JOB_ID": "4711", "PATH": f"{tools}:{os.environ['PATH']}"
        },
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert outcome_of(folder)["code"] == ExitCode.STOPPED, finished.stdout
    assert done.read_text() == "requeue 4711\n"
    assert "SLURM has put job 4711 back into its queue" in finished.stdout


@pytest.mark.faults
def test_a_cancelled_job_does_not_come_back(data, tmp_path):
    ended = launch(data, tmp_path / "run", "run.requeue=true", fault="term@step:6,rank:1")
    assert ended.outcome["code"] == ExitCode.STOPPED, ended.output
    assert "queue" not in ended.output


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_a_console_that_goes_away_ends_no_run(data, tmp_path, processes):
    """As ``pretrain | head``: nobody reads what the run says any more."""
    folder = tmp_path / "run"
    reader, writer = os.pipe()
    with subprocess.Popen(
        command(data, f"run.directory={folder}", processes=processes),
        cwd=ROOT, env=environment(""), stdout=writer, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            os.close(writer)
            os.read(reader, 1)
            os.close(reader)
            assert process.wait(timeout=100) == 0
        finally:
            process.kill()
    assert outcome_of(folder)["code"] == 0
    assert len(records(folder, "step")) == 12


@pytest.mark.faults
def test_a_rank_that_dies_before_the_ranks_meet_is_not_waited_for(data, tmp_path):
    """torchrun tells the other one to end, which is deaf to nothing yet."""
    began = time.monotonic()
    ended = launch(data, tmp_path / "run", fault="kill9@step:0,rank:1,at:meet")
    assert ended.code != 0
    assert ended.seconds_to_end <= 5
    assert time.monotonic() - began < 60
