"""Putting a job of SLURM back into its queue, or saying why not; tests/launch/test_slurm.py has the real one."""

from pathlib import Path

import pytest

from megatron_bert_tp.errors import TrainingError
from megatron_bert_tp.reliability.requeue import requeue


@pytest.fixture
def scontrol(tmp_path, monkeypatch) -> Path:
    """A stand-in for SLURM's own, for what a real one does not answer at will."""
    path = tmp_path / "scontrol"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return path


def answer(scontrol: Path, script: str) -> None:
    scontrol.write_text(f"#!/bin/sh\n{script}\n")
    scontrol.chmod(0o755)


def test_the_job_is_given_to_scontrol_and_the_line_names_it(scontrol):
    answer(scontrol, f'echo "$@" > {scontrol}.log')
    assert requeue("1234") == "SLURM has put job 1234 back into its queue"
    assert Path(f"{scontrol}.log").read_text() == "requeue 1234\n"


def test_what_slurm_refuses_is_told_with_its_reason_and_a_way_out(scontrol):
    answer(scontrol, "echo 'Requested operation is presently disabled' >&2; exit 1")
    with pytest.raises(
        TrainingError, match=r"job 7 cannot .* presently disabled; submit it with sbatch --requeue"
    ):
        requeue("7")


def test_outside_of_slurm_it_is_told_how_to_start():
    with pytest.raises(TrainingError, match=r"no job of SLURM .*sbatch launch/slurm\.sbatch"):
        requeue(None)


def test_a_node_without_scontrol_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TrainingError, match="there is no scontrol here; put it back yourself: scontrol requeue 7"):
        requeue("7")
