"""Asked to stop, by signals and by the clock, at any moment (rows 4 and 5)."""

import re
import signal
import time
from pathlib import Path

import pytest

from megatron_bert_tp.checkpoint.directories import candidates, partials
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.errors import ExitCode
from tests.faults.runs import (
    Ended,
    assert_ends_like,
    launch,
    num_steps,
    on_a_quiet_machine,
    start,
    start_script,
    tensors_of,
)
from tests.training.runs import records

DATA, TENSOR, PIPELINE = "parallel.shard_optimizer=true", "parallel.tensor=2", "parallel.pipeline=2"
HANDLED = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
UNHURRIED = "slow=0.2@step:1,until:12,at:step"
SECOND = 0.8
"""Seconds to a second SIGINT that is not the same press of the keys."""


def assert_stopped(folder: Path, ended: Ended, step: int, reason: str) -> None:
    """With nothing lost: the last step in the metrics is the step of a whole checkpoint."""
    assert ended.outcome["code"] == ExitCode.STOPPED, ended.output
    assert f"stopped after step {step} of 12 ({reason})" in ended.outcome["cause"]
    assert ended.outcome["step"] == step
    assert [row["step"] for row in records(folder, "step")] == list(range(1, step + 1))
    assert ended.outcome["checkpoint"].endswith(f"step_{step:08d}")
    tensors_of(folder, step)


def assert_all_whole(folder: Path) -> list[int]:
    """Nothing half written lies about; steps of the checkpoints, newest first."""
    root = folder / "checkpoints"
    assert partials(root) == []
    for path in candidates(root):
        Checkpoint.open(path).verify()
    return [int(path.name.removeprefix("step_")) for path in candidates(root)]


SIGNALS_TO_ONE = [
    pytest.param("usr1", 1, TENSOR, id="usr1", marks=pytest.mark.faults),
    pytest.param("term", 0, PIPELINE, id="term", marks=pytest.mark.faults),
    pytest.param("int", 1, DATA, id="int", marks=pytest.mark.faults),
]


@pytest.mark.parametrize(("kind", "rank", "layout"), SIGNALS_TO_ONE)
def test_a_signal_to_one_rank_stops_all_after_the_step_and_the_run_goes_on_bit_for_bit(
    data, tmp_path, whole, kind, rank, layout
):
    """Row 4: no step is lost, and none is begun after the signal."""
    folder = tmp_path / "run"
    fault = f"{kind}@step:5,rank:{rank};slow=0.2@step:5,rank:{rank},at:optimizer"
    ended = launch(data, folder, layout, fault=fault)
    assert ended.code != 0, "torchrun knows no other"
    assert_stopped(folder, ended, 5, f"SIG{kind.upper()}")
    assert ended.seconds_to_detect <= 0.2 + 1
    again = launch(data, folder, layout)
    assert (again.code, again.outcome["code"]) == (0, 0), again.output
    assert_ends_like(folder, whole(layout))


NAMES = ["SIGTERM", "SIGUSR1", "SIGINT"]


@pytest.mark.faults
@pytest.mark.parametrize("name", NAMES)
def test_a_signal_to_torchrun_stops_all_ranks_with_nothing_lost(data, tmp_path, name):
    """Row 4, with the options of launch/torchrun.sh: at most one step more than the one it came in."""
    folder = tmp_path / "run"
    with start(data, folder, TENSOR, fault=UNHURRIED, options=(HANDLED,)) as running:
        running.wait_for_step(3)
        sent = running.send(getattr(signal, name))
        done = num_steps(folder)
        ended = running.end()
    assert ended.code == 1, "torchrun knows no other"
    step = ended.outcome["step"]
    assert_stopped(folder, ended, step, name)
    assert done <= step <= done + 2
    assert ended.outcome["time"] - sent <= 1


@pytest.mark.parametrize(
    "name", [name if name == "SIGTERM" else pytest.param(name, marks=pytest.mark.faults) for name in NAMES]
)
def test_a_signal_to_the_script_ends_it_with_75_and_the_run_goes_on_bit_for_bit(data, tmp_path, whole, name):
    """Row 4: 75 while the run is not finished, 0 when it is."""
    folder = tmp_path / "run"

    def signalled() -> tuple[Ended, float, int]:
        with start_script(data, folder, TENSOR, fault=UNHURRIED) as running:
            running.wait_for_step(3)
            sent = running.send(getattr(signal, name))
            done = num_steps(folder)
            return running.end(), sent, done

    ended, sent, done = on_a_quiet_machine(
        signalled, lambda found: found[0].outcome["time"] - found[1] <= 1, anew=folder
    )
    assert ended.code == ExitCode.STOPPED, ended.output
    assert done <= ended.outcome["step"] <= done + 2
    assert_stopped(folder, ended, ended.outcome["step"], name)
    assert ended.outcome["time"] - sent <= 1
    if name == "SIGTERM":
        assert start_script(data, folder, TENSOR).end().code == 0
        assert_ends_like(folder, whole(TENSOR))


BUSY = [
    pytest.param("slow=30@step:4,at:write", "slow", id="saving"),
    pytest.param("slow=30@step:6,rank:1,at:forward", "slow", id="one-waits-for-the-other"),
    pytest.param("slow=30@step:6,rank:0,at:reduce", "slow", id="the-other-waits-for-one"),
]


@pytest.mark.faults
@pytest.mark.parametrize(("fault", "mark"), BUSY)
def test_a_second_interruption_ends_all_at_once_and_leaves_the_checkpoint_before(data, tmp_path, fault, mark):
    """Row 4: immediately, whatever the ranks do; 130."""
    folder = tmp_path / "run"
    given = (DATA, "run.save_every=2")
    with start_script(data, folder, *given, fault=fault) as running:
        running.wait_for_fault(mark)
        running.send(signal.SIGINT)
        time.sleep(SECOND)
        assert running.process.poll() is None
        second = running.send(signal.SIGINT)
        ended = running.end()
    assert ended.code == ended.outcome["code"] == ExitCode.INTERRUPTED, ended.output
    assert ended.outcome["time"] - second <= 0.5
    assert ended.ended - second <= 4, "the launcher ends too"
    newest = 2 if "write" in fault else 4
    assert candidates(folder / "checkpoints")[0].name == f"step_{newest:08d}"
    again = launch(data, folder, *given)
    assert f"step_{newest:08d}, step {newest}" in again.output
    assert again.outcome["code"] == 0


@pytest.mark.faults
def test_a_second_interruption_ends_a_process_without_launcher_while_it_saves(data, tmp_path):
    folder = tmp_path / "run"
    with start(data, folder, processes=1, fault="slow=30@step:4,at:write") as running:
        running.wait_for_fault("slow")
        running.send(signal.SIGINT)
        time.sleep(SECOND)
        second = running.send(signal.SIGINT)
        ended = running.end()
    assert ended.code == ended.outcome["code"] == ExitCode.INTERRUPTED, ended.output
    assert ended.ended - second <= 0.5


@pytest.mark.faults
def test_a_signal_during_the_start_stops_the_run_after_its_first_step(data, tmp_path):
    folder = tmp_path / "run"
    ended = launch(data, folder, DATA, fault="term@step:0,rank:1,at:start;slow=0.2@step:0,rank:1,at:start")
    assert_stopped(folder, ended, 1, "SIGTERM")


@pytest.mark.faults
def test_a_signal_during_an_evaluation_stops_the_run_behind_it(data, tmp_path, whole):
    """Row 4: the evaluation is told once, also in the run that goes on."""
    folder = tmp_path / "run"
    given = (DATA, "run.evaluation_samples=8", "run.evaluate_every=3")
    fault = "usr1@step:6,rank:1,at:evaluate;slow=0.2@step:6,rank:1,at:evaluate"
    ended = launch(data, folder, *given, fault=fault)
    assert_stopped(folder, ended, 6, "SIGUSR1")
    assert [row["step"] for row in records(folder, "evaluation")] == [3, 6]
    assert launch(data, folder, *given).outcome["code"] == 0
    assert_ends_like(folder, whole(*given))


@pytest.mark.faults
@pytest.mark.parametrize("at", ["step", "save"])
def test_a_signal_in_the_last_step_or_its_save_finds_a_finished_run(data, tmp_path, at):
    """Row 4: 0 only when the run is finished, and then 0."""
    folder = tmp_path / "run"
    ended = launch(data, folder, DATA, fault=f"term@step:12,rank:1,at:{at};slow=0.3@step:12,rank:1,at:{at}")
    assert (ended.code, ended.outcome["code"]) == (0, ExitCode.FINISHED), ended.output
    assert assert_all_whole(folder) == [12, 8]


@pytest.mark.faults
@pytest.mark.parametrize("background", ["true", "false"])
def test_a_stop_during_a_save_waits_for_it_and_saves_what_came_since(data, tmp_path, whole, background):
    """Row 5: never corrupt, then 75."""
    folder = tmp_path / "run"
    given = (DATA, f"run.save_in_background={background}")
    busy = "slow=1.5@step:4,rank:1,at:write"
    asked = "term@step:6,rank:0" if background == "true" else "term@step:4,rank:1,at:write"
    ended = launch(data, folder, *given, fault=f"{asked};{busy}")
    step = 6 if background == "true" else 5  # the signal is heard before the save, or behind the next step
    assert_stopped(folder, ended, step, "SIGTERM")
    assert assert_all_whole(folder) == [step, 4]
    assert launch(data, folder, *given).outcome["code"] == 0
    assert_ends_like(folder, whole(DATA))


@pytest.mark.faults
def test_a_launcher_that_loses_patience_with_a_save_leaves_the_checkpoint_before(data, tmp_path, whole):
    """Row 5: torchrun's time to shut down runs out, here 1 s, and it kills the ranks."""
    folder = tmp_path / "run"
    with start_script(data, folder, DATA, fault="slow=30@step:8,at:commit", SHUTDOWN_SECONDS="1") as running:
        running.wait_for_fault("slow")
        sent = running.send(signal.SIGTERM)
        ended = running.end()
    assert ended.code not in (0, ExitCode.STOPPED)
    assert ended.ended - sent <= 15
    again = launch(data, folder, DATA)
    assert re.search(r"checkpoint passed over: .*step_00000008\.partial-\w+: is not finished", again.output)
    assert again.outcome["code"] == 0
    assert assert_all_whole(folder) == [12, 8]
    assert_ends_like(folder, whole(DATA))


@pytest.mark.faults
def test_a_run_that_was_given_its_time_has_stopped_and_saved_within_it(data, tmp_path):
    """Row 5: `run.stop_after` counts from before the first step."""
    folder = tmp_path / "run"
    given = (DATA, "run.stop_after=9s", "optimizer.steps=40")
    ended = launch(data, folder, *given, fault="slow=0.3@step:1,until:40,at:step")
    assert ended.outcome["code"] == ExitCode.STOPPED, ended.output
    assert "(run.stop_after)" in ended.outcome["cause"]
    step = ended.outcome["step"]
    assert ended.outcome["time"] - ended.began >= 7, "the time is used: 9 s less two steps and a save"
    assert ended.seconds_to_detect <= 9, "from the first step on"
    assert [row["step"] for row in records(folder, "step")] == list(range(1, step + 1))
    assert assert_all_whole(folder)[0] == step
