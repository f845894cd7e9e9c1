"""launch/torchrun.sh hands signals on, waits for the save, and exits with the code of the run."""

import os
import pty
import resource
import signal
import sys
import time
from pathlib import Path

import pytest

from megatron_bert_tp.errors import ExitCode
from megatron_bert_tp.reliability.outcome import Outcome, OutcomeFile
from tests.launch.running import Started, end_family, environment, interpreter, is_alive, start, wait_for
from tests.sources import ROOT
from tests.training.runs import records

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

SETTINGS = ROOT / "configs" / "demo.yaml"  # a stand-in reads no more of it than the folder of the run


class Launch:
    """One launch with two stand-ins, and its folder."""

    def __init__(self, folder: Path, task: str, **variables: str) -> None:
        self.run = folder / "run"
        (folder / "temporary").mkdir()
        self.arguments = [SETTINGS, f"run.directory={self.run}", "parallel.tensor=2", "parallel.pipeline=1"]
        self.variables = {
            "PYTHON": str(interpreter(folder)),
            "STAND_IN": task,
            "TMPDIR": str(folder / "temporary"),
            **variables,
        }

    def start(self) -> Started:
        return start("torchrun.sh", *self.arguments, **self.variables)

    def finish(self) -> tuple[int, str]:
        with self.start() as process:
            _, said = process.communicate(timeout=100)
            return process.returncode, said

    def are_ready(self) -> bool:
        return all((self.run / f"ready.{rank}").exists() for rank in range(2))

    def ranks(self) -> list[int]:
        return [int((self.run / f"ready.{rank}").read_text()) for rank in range(2)]

    def signals(self) -> list[str]:
        files = [self.run / f"signals.{rank}" for rank in range(2)]
        return [file.read_text() if file.exists() else "" for file in files]

    def wait_for_signals(self, count: int) -> None:
        """Until each rank has noted so many."""
        wait_for(lambda: all(len(heard.split()) >= count for heard in self.signals()))

    def let_go(self) -> None:
        """Let ranks end that ``save``, after a while in which they hear what came once too often."""
        time.sleep(0.5)
        (self.run / "go").touch()


def processor_seconds_of_children() -> float:
    """Of those that have ended; unlike the time of day, it does not grow with the load of the machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_end_of_a_finished_run_is_0_and_its_meeting_place_is_removed(tmp_path):
    launch = Launch(tmp_path, "finish")
    assert launch.finish()[0] == 0
    assert list((tmp_path / "temporary").glob("tmp.*")) == []


@pytest.mark.parametrize(
    ("task", "code"),
    [("fail", ExitCode.HANG), ("vanish", 1)],
)
def test_the_code_is_that_which_a_rank_has_written_and_never_0_without(tmp_path, task, code):
    assert Launch(tmp_path, task).finish()[0] == code


def test_the_outcome_of_an_earlier_run_is_not_taken(tmp_path):
    launch = Launch(tmp_path, "crash")
    launch.run.mkdir()
    OutcomeFile(launch.run).claim(Outcome(code=ExitCode.FINISHED, cause="earlier"))
    code, said = launch.finish()
    assert code == 1, "torchrun's own"
    assert "nothing is known" in said


def test_a_restart_that_finishes_counts(tmp_path):
    assert Launch(tmp_path, "restart", MAX_RESTARTS="1").finish()[0] == 0


@pytest.mark.parametrize(
    ("name", "heard"),
    [
        ("SIGTERM", "SIGTERM"),
        ("SIGINT", "SIGINT"),
        ("SIGUSR1", "SIGUSR1"),
        ("SIGHUP", "SIGTERM"),
        ("SIGQUIT", "SIGQUIT"),
    ],
)
def test_a_signal_to_the_script_reaches_each_rank_once_and_the_save_is_waited_for(tmp_path, name, heard):
    launch = Launch(tmp_path, "obey")
    with launch.start() as process:
        wait_for(launch.are_ready)
        process.send_signal(getattr(signal, name))
        assert process.wait(60) == ExitCode.STOPPED
    assert launch.signals() == [heard, heard]


def test_several_signals_reach_the_ranks_and_leave_none_behind(tmp_path):
    """A third one would end torchrun, but not its processes."""
    launch = Launch(tmp_path, "save")
    with launch.start() as process:
        wait_for(launch.are_ready)
        for count, name in enumerate(("SIGUSR1", "SIGTERM", "SIGHUP", "SIGTERM"), start=1):
            process.send_signal(getattr(signal, name))
            launch.wait_for_signals(count)
        launch.let_go()
        assert process.wait(60) == ExitCode.STOPPED
    assert launch.signals() == ["SIGUSR1 SIGTERM SIGTERM SIGTERM"] * 2
    assert not any(map(is_alive, launch.ranks()))


def test_ranks_that_do_not_end_are_killed_after_the_time_to_shut_down(tmp_path):
    launch = Launch(tmp_path, "deaf", SHUTDOWN_SECONDS="1")
    with launch.start() as process:
        wait_for(launch.are_ready)
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        wait_for(lambda: not any(map(is_alive, launch.ranks())))
        assert time.monotonic() - started < 15
        assert process.wait(60) not in (0, ExitCode.STOPPED)


@pytest.mark.parametrize(("presses", "code"), [(1, ExitCode.STOPPED), (2, ExitCode.INTERRUPTED)])
def test_control_c_in_a_terminal_counts_once_each_time(tmp_path, presses, code):
    """The terminal sends it to the whole group of processes in its foreground; torchrun must not be in there."""
    launch = Launch(tmp_path, "save")
    variables = environment(launch.variables.pop("PYTHON"), **launch.variables)
    process, terminal = pty.fork()
    if process == 0:
        command = [str(ROOT / "launch" / "torchrun.sh"), *map(str, launch.arguments)]
        os.execve(command[0], command, variables)
    try:
        wait_for(launch.are_ready)
        for count in range(1, presses + 1):
            os.write(terminal, b"\x03")
            launch.wait_for_signals(count)
        launch.let_go()
    except BaseException:
        end_family(process)
        raise
    finally:
        ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        os.close(terminal)
    assert ended == code
    assert launch.signals() == [" ".join(["SIGINT"] * presses)] * 2


@pytest.mark.parametrize(
    ("arguments", "processes", "message"),
    [
        (["model.hidden_sise=50"], "2", "did you mean model.hidden_size?"),
        ([], "3", "must be a multiple of 2 = parallel.tensor (2) x parallel.pipeline (1)"),
    ],
)
def test_bad_settings_are_told_once_before_a_process_is_started(tmp_path, arguments, processes, message):
    launch = Launch(tmp_path, "finish", NPROC=processes)
    launch.arguments += arguments
    before = processor_seconds_of_children()
    code, said = launch.finish()
    assert processor_seconds_of_children() - before < 2, "the check takes half a second, torchrun another four"
    assert code == ExitCode.BAD_SETTINGS
    assert said.count("1 problem in the settings") == 1
    assert message in said
    assert not launch.run.exists()


def test_without_arguments_the_usage_is_told(tmp_path):
    launch = Launch(tmp_path, "finish")
    launch.arguments = []
    assert launch.finish() == (2, "usage: [NPROC=N] launch/torchrun.sh CONFIG.yaml [section.key=value ...]\n")


@pytest.mark.faults
def test_a_run_that_is_stopped_saves_exits_with_75_and_goes_on_to_its_end(data, tmp_path):
    """The entry point itself, with no stand-in."""
    run = tmp_path / "run"
    arguments = [data, f"run.directory={run}", "parallel.tensor=2", "optimizer.steps=60", "run.save_every=1000"]
    with start("torchrun.sh", *arguments) as process:
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(records(run, "step")) > 2)
        process.send_signal(signal.SIGUSR1)
        assert process.communicate(timeout=100)[0].splitlines()[-1].startswith("ended: stopped; code=75")
        assert process.returncode == ExitCode.STOPPED
    with start("torchrun.sh", *arguments) as process:
        process.communicate(timeout=100)
        assert process.returncode == 0
    assert [row["step"] for row in records(run, "step")] == list(range(1, 61)), "each step once"
