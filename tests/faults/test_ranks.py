"""Faults of one rank: killed, stopped, hanging, failing, slow, with wrong numbers (rows 1 and 13 to 17)."""

import re
from pathlib import Path

import pytest

from megatron_bert_tp.errors import ExitCode
from tests.faults.runs import Ended, differing, launch, on_a_quiet_machine, tensors_of
from tests.training.runs import records, without_times

LAYOUTS = {
    "pipeline": ("parallel.pipeline=2",),
    "tensor": ("parallel.tensor=2",),
    "data": ("parallel.shard_optimizer=true",),
}
PATIENCE = "run.step_timeout_seconds=4"


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """Folder of a whole run of each layout."""
    runs: dict[str, Path] = {}

    def run_of(layout: str) -> Path:
        if layout not in runs:
            runs[layout] = tmp_path_factory.mktemp(layout) / "run"
            ended = launch(data, runs[layout], *LAYOUTS[layout])
            assert (ended.code, ended.outcome["code"]) == (0, 0), ended.output
        return runs[layout]

    return run_of


def assert_ends_like(folder: Path, truth: Path) -> None:
    """The same losses in every step, and the same bits in every tensor."""
    assert without_times(records(folder, "step")) == without_times(records(truth, "step"))
    assert differing(tensors_of(folder), tensors_of(truth)) == []


def last_lines(ended: Ended, number: int = 20) -> str:
    return "\n".join(ended.output.strip().splitlines()[-number:])


KILLS = [
    pytest.param("pipeline", "forward", 1),
    *(
        pytest.param(layout, at, rank, marks=pytest.mark.faults)
        for layout, at, rank in [
            ("pipeline", "messages", 0),
            ("pipeline", "backward", 1),
            ("tensor", "forward", 0),
            ("tensor", "optimizer", 1),
            ("data", "reduce", 0),
            ("data", "backward", 1),
        ]
    ),
]


@pytest.mark.parametrize(("layout", "at", "rank"), KILLS)
def test_a_killed_rank_ends_the_run_which_goes_on_as_if_nothing_had_been(
    data, tmp_path, undisturbed, layout, at, rank
):
    """Row 1.  Step 7 of 12, saved every 4: one step was saved less than four steps before."""
    folder = tmp_path / "run"
    fault = f"kill9@step:7,rank:{rank},at:{at}"
    ended = on_a_quiet_machine(
        lambda: launch(data, folder, *LAYOUTS[layout], "run.save_in_background=false", fault=fault),
        lambda ended: ended.seconds_to_detect <= 1 and ended.seconds_to_end <= 5,
        anew=folder,
    )
    assert ended.code != 0
    assert ended.outcome["code"] == ExitCode.PEER_LOST
    assert re.fullmatch(rf"rank {rank} \(process \d+\) is gone.*", ended.outcome["cause"])
    assert ended.seconds_to_detect <= 1
    assert ended.seconds_to_end <= 5
    assert ended.outcome["checkpoint"].endswith("step_00000004")
    again = launch(data, folder, *LAYOUTS[layout])
    assert again.outcome["code"] == 0, again.output
    assert "goes on from" in again.output
    assert "step 4" in again.output
    assert_ends_like(folder, undisturbed(layout))


@pytest.mark.faults
def test_a_restarting_launcher_brings_a_killed_rank_back_without_a_human(data, tmp_path, undisturbed):
    folder = tmp_path / "run"
    options = ("--max-restarts=2",)
    ended = launch(data, folder, *LAYOUTS["tensor"], fault="kill9@step:7,rank:1", options=options)
    assert (ended.code, ended.outcome["code"]) == (0, 0), ended.output
    assert_ends_like(folder, undisturbed("tensor"))
    # From the kill to the last step: restart, resume and the eight steps that were left.
    assert ended.seconds_to_detect <= 15


@pytest.mark.parametrize(
    ("kind", "is_quick"),
    [("raise", True), pytest.param("oom", False, marks=pytest.mark.faults)],
)
def test_an_exception_of_one_rank_is_the_last_word(data, tmp_path, kind, is_quick):
    """Row 17: the cause is among the last 20 lines, no peer's broken pipe is told."""
    folder = tmp_path / "run"
    ended = launch(data, folder, *LAYOUTS["pipeline"], fault=f"{kind}@step:6,rank:1,at:backward")
    error = "ValueError: a fault in the hook of a user" if kind == "raise" else "RuntimeError: "
    assert ended.code != 0
    assert error in last_lines(ended)
    assert "onnection closed" not in ended.output
    assert "onnection reset" not in ended.output
    assert (ended.outcome["code"], ended.outcome["rank"], ended.outcome["step"]) == (ExitCode.BUG, 1, 5)
    assert ended.outcome["cause"].startswith(error)
    assert ended.seconds_to_detect <= 2
    assert is_quick or "alloc" in ended.outcome["cause"]


@pytest.mark.faults
def test_a_rank_that_leaves_without_a_word_is_missed(data, tmp_path):
    ended = launch(data, tmp_path / "run", *LAYOUTS["pipeline"], fault="exit0@step:6,rank:1")
    assert ended.code != 0, "torchrun takes an exit with 0 for success"
    assert ended.outcome["code"] == ExitCode.PEER_LOST
    assert ended.seconds_to_end <= 5


HANGS = [
    pytest.param("stop", 1, "pipeline", id="stopped"),
    pytest.param("hang", 0, "pipeline", id="hanging", marks=pytest.mark.faults),
    pytest.param("stop", 0, "tensor", id="first-stopped", marks=pytest.mark.faults),
    pytest.param("hang", 1, "data", id="hanging-replica", marks=pytest.mark.faults),
]


@pytest.mark.parametrize(("kind", "rank", "layout"), HANGS)
def test_a_hang_is_ended_with_what_each_rank_did_last(data, tmp_path, kind, rank, layout):
    """Row 16: within the timeout and 2 s, with a stopped rank within 10 s, the end of torchrun included."""
    fault = f"{kind}@step:6,rank:{rank},at:backward"
    ended = on_a_quiet_machine(
        lambda: launch(data, tmp_path / "run", *LAYOUTS[layout], PATIENCE, fault=fault),
        lambda ended: ended.seconds_to_detect <= 4 + 2 and ended.seconds_to_end <= 10,
        anew=tmp_path / "run",
    )
    assert ended.code != 0
    assert ended.outcome["code"] == ExitCode.HANG
    assert ended.seconds_to_detect <= 4 + 2
    assert ended.seconds_to_end <= 10
    state = "stopped" if kind == "stop" else "running"
    rows = re.findall(r"^(\d) +\d+ +6 +[\d.]+ s +(\w+) +(.*)$", ended.output, re.MULTILINE)
    assert len(rows) == 2, ended.output
    (own,) = [row for row in rows if int(row[0]) == rank]
    assert own[1:] == (state, "backward of microbatch 0")
    assert f"rank {rank} (process" in ended.outcome["cause"]
    # Stacks of the ranks that can still show them: of the hanging one the line in which it sleeps.
    assert ("time.sleep(10_000)" in ended.output) == (kind == "hang")


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_gradient_that_is_not_finite_stops_all_ranks_before_the_weights_move(data, tmp_path, kind):
    """Row 13, through the command; tests/training/test_diagnosis.py has all kinds of places."""
    folder = tmp_path / "run"
    ended = launch(data, folder, *LAYOUTS["tensor"], fault=f"{kind}@step:6,rank:1,at:reduce")
    assert ended.outcome["code"] == ExitCode.NOT_FINITE
    assert "step 6 (samples 40 to 47)" in ended.outcome["cause"]
    assert [row["step"] for row in records(folder, "step")] == [1, 2, 3, 4, 5]
    assert (folder / "anomalies.jsonl").read_text().count("\n") == 1


@pytest.mark.faults
def test_a_step_that_is_not_finite_is_skipped_where_that_is_asked_for(data, tmp_path):
    folder = tmp_path / "run"
    skip = "run.anomalies.not_finite=skip"
    ended = launch(data, folder, *LAYOUTS["tensor"], skip, fault="nan@step:6,rank:1,at:reduce")
    assert ended.outcome["code"] == 0, ended.output
    assert [row["skipped"] for row in records(folder, "step")] == [0] * 5 + [1] + [0] * 6


@pytest.mark.faults
@pytest.mark.parametrize("layout", [LAYOUTS["tensor"], ()], ids=["tensor", "data"])
def test_a_flipped_bit_of_a_replica_is_found_at_the_next_check(data, tmp_path, layout):
    """Row 14: of two that differ, neither can be outvoted, so both are named."""
    given = (*layout, "run.check_replicas_every=4")
    ended = launch(data, tmp_path / "run", *given, fault="flip@step:6,rank:1,at:after")
    assert ended.outcome["code"] == ExitCode.RANKS_DIFFER
    assert ended.outcome["step"] == 8
    (name,) = re.findall(r"fault: flipped a bit of (\S+)", ended.output)
    assert "position_embeddings.weight" in name
    assert "position_embeddings.weight" in ended.outcome["cause"]


@pytest.mark.faults
def test_a_slow_rank_is_named_with_the_phase_and_the_job_goes_on(data, tmp_path):
    """Row 15: within two intervals.  Rank 1 sleeps 50 ms before each backward of three intervals of 10 steps."""
    given = (*LAYOUTS["data"], "run.stragglers_every=10", "optimizer.steps=40", "run.save_every=40")
    ended = launch(data, tmp_path / "run", *given, fault="slow=0.05@step:1,until:30,rank:1,at:backward")
    assert ended.outcome["code"] == 0, ended.output
    told = re.findall(r"^rank (\d) is slow: (\w+) takes", ended.output, re.MULTILINE)
    assert told
    assert set(told) == {("1", "backward")}
    lines = ended.output.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("rank 1 is slow"))
    step = max(int(found[1]) for line in lines[:first] if (found := re.match(r"step +(\d+)/", line)))
    assert step <= 20
