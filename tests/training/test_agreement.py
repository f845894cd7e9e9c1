"""Failures of some rank, on real ranks: known to all where they agree, and told by the rank that has them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_bert_tp.config.environment import LaunchEnvironment
from megatron_bert_tp.errors import DataError, DirectoryError, ElsewhereError, MegatronBertError
from megatron_bert_tp.parallel.agreement import Agreement, Told
from megatron_bert_tp.training.failures import Ending, telling, together
from tests.support import TIMEOUT

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
import time
from datetime import timedelta
import torch
import torch.distributed as dist
from megatron_bert_tp.config.command_line import run_command
from megatron_bert_tp.config.environment import read_environment
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.training.failures import Ending, telling, together
from megatron_bert_tp.training.processes import process_group

def main(failing):
    environment = read_environment()
    cpu = torch.device("cpu")
    with process_group(environment, cpu, timedelta(seconds=100)), telling(Ending(environment)):
        agreement = Agreement.of_world(timedelta(seconds=100))
        if environment.is_first:
            print(time.time(), flush=True)
        with together(agreement):
            if "together" in failing and environment.is_first:
                raise DataError("the corpus is damaged")
        if str(environment.rank) in failing:
            raise DataError("the corpus is damaged")
        dist.all_reduce(torch.zeros(1))

sys.exit(run_command(main, usage="usage"))
"""


def agreed(texts: list[str | None]) -> str | None:
    told = Agreement.of_world(TIMEOUT).first(texts[dist.get_rank()])
    return None if told is None else told.text


@pytest.mark.parametrize(
    ("texts", "first"),
    [
        ([None, None, None, None], None),
        ([None, None, "full", None], "full"),
        ([None, "late", None, "later"], "late"),
        (["first", "second", None, None], "first"),
        ([None, "", None, None], "?"),
        ([None, None, None, "ä" * 1500], "ä" * 1000),
        ([None, None, None, "-" + "ä" * 1500], "-" + "ä" * 999),
    ],
)
def test_all_ranks_get_the_text_of_the_first_that_failed(ranks, texts, first):
    assert ranks.run(4, agreed, texts) == [first] * 4


def raised_together(failing: int) -> str:
    try:
        with together(Agreement.of_world(TIMEOUT)):
            if dist.get_rank() == failing:
                raise FileExistsError(17, "File exists", "/runs/a")
    except ElsewhereError as error:
        return f"rank {error.rank} exits with {error.exit_code}: {error}"
    except MegatronBertError as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


def test_what_one_rank_does_for_all_fails_on_all(ranks):
    text = "/runs/a: File exists; check the path, its permissions and the free space"
    for rank in (0, 2):
        told = [f"rank {rank} exits with 8: {text}"] * 4
        told[rank] = f"DirectoryError: {text}"
        assert ranks.run(4, raised_together, rank) == told
    assert ranks.run(4, raised_together, 4) == ["went on"] * 4


def test_one_process_agrees_with_itself():
    agreement = Agreement.alone()
    assert agreement.first("full") == Told(0, "full")
    assert agreement.first(None) is None
    assert agreement.maximum([3, -1]) == [3, -1]
    assert agreement.gathered([0.5]) == [[0.5]]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DataError("no corpus"), "error: no corpus\n"),
        (FileExistsError(17, "File exists", "/runs/a"), "error: /runs/a: File exists; check"),
        (OSError(28, "No space left on device"), "error: No space left on device; check"),
    ],
)
def test_what_the_user_can_mend_is_one_message(capsys, error, told):
    with pytest.raises(DataError if isinstance(error, DataError) else DirectoryError) as caught, told_alone():
        raise error
    assert caught.value.is_told
    assert capsys.readouterr().err.startswith(told)


def told_alone():
    return telling(Ending(LaunchEnvironment()))


def test_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(ZeroDivisionError), told_alone():
        _ = 1 // 0
    assert capsys.readouterr().err == ""


def launched(folder: Path, *failing: str) -> str:
    """What two ranks under torchrun say on stderr, where the ranks ``failing`` raise."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [*command, *failing],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert time.time() - float(done.stdout) < 60  # since the failure, and not the 100 s of a message
    return done.stderr


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_fails_alone_is_heard_under_torchrun(tmp_path, rank):
    told = launched(tmp_path, rank)
    assert told.count("the corpus is damaged") == 1, told
    assert ("error on rank 1: the corpus" if rank == "1" else "error: the corpus") in told


def test_what_rank_0_does_for_all_is_told_once_and_without_traceback(tmp_path):
    told = launched(tmp_path, "together")
    assert told.count("the corpus is damaged") == 1, told
    assert "error: the corpus is damaged" in told
    assert "[rank" not in told


def test_what_hits_all_ranks_is_told_once_under_torchrun(tmp_path):
    told = launched(tmp_path, "0", "1")
    assert told.count("the corpus is damaged") == 1, told
    assert "error: the corpus is damaged" in told
