"""Entry points answer user errors with one message, the exit code of its class, and at once."""

import os
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bert_tp.config.command_line import config_from_arguments, run_command
from megatron_bert_tp.errors import ConfigError, DataError

LAUNCH = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
DEMO = str(Path(__file__).parents[2] / "configs" / "demo.yaml")
TASK = str(Path(__file__).parents[2] / "configs" / "finetune" / "sst-2.yaml")
COMMAND = """
import sys
from megatron_bert_tp.config.command_line import {read}, run_command

def main(arguments):
    {read}(arguments, "usage: pretrain CONFIG.yaml [section.key=value ...]")

code = run_command(main, usage="usage")
heavy = {{"torch", "numpy", "transformers"}} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


def fail(_arguments: list[str]) -> int:
    raise DataError("no corpus")


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[float]]:
    """Become a rank of a launch of 4; returns the waits that would have been slept."""

    def _as_rank(rank: int) -> list[float]:
        waits: list[float] = []
        for name, text in {**LAUNCH, "RANK": str(rank), "LOCAL_RANK": str(rank)}.items():
            monkeypatch.setenv(name, text)
        monkeypatch.setattr(time, "sleep", waits.append)
        return waits

    return _as_rank


def test_user_error_is_one_message_and_the_exit_code_of_its_class(capsys: pytest.CaptureFixture[str]):
    assert run_command(fail, usage="", arguments=[]) == 3
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "error: no corpus\n")


def test_our_own_bugs_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda _: 1 // 0, usage="", arguments=[])


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_exit_code_is_what_the_command_returns(returned: int | None, code: int):
    assert run_command(lambda _: returned, usage="", arguments=[]) == code


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["x.yaml", "run.log_every=1", "--help"]])
def test_help_is_printed_and_nothing_is_run(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert run_command(fail, usage="how to use it\n", arguments=arguments) == 0
    assert capsys.readouterr().out == "how to use it\n"


def test_first_rank_tells_at_once(as_rank: Callable[[int], list[float]], capsys: pytest.CaptureFixture[str]):
    waits = as_rank(0)
    assert run_command(fail, usage="", arguments=[]) == 3
    assert capsys.readouterr().err == "error: no corpus\n"
    assert waits == []


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_other_rank_waits_to_be_ended_before_it_tells(
    rank: int, as_rank: Callable[[int], list[float]], capsys: pytest.CaptureFixture[str]
):
    waits = as_rank(rank)
    assert run_command(fail, usage="", arguments=[]) == 3
    assert capsys.readouterr().err == f"error on rank {rank}: no corpus\n"
    assert waits == [5 + 0.5 * rank]


def test_help_is_printed_by_the_first_rank_alone(
    as_rank: Callable[[int], list[float]], capsys: pytest.CaptureFixture[str]
):
    as_rank(1)
    assert run_command(fail, usage="how to use it", arguments=["-h"]) == 0
    assert capsys.readouterr().out == ""


def test_world_size_of_the_launch_is_checked(as_rank: Callable[[int], list[float]]):
    as_rank(0)
    assert config_from_arguments([DEMO], "usage")
    with pytest.raises(ConfigError, match=r"world size = 4\n.*multiple of 8"):
        config_from_arguments([DEMO, "parallel.pipeline=4"], "usage")


@pytest.mark.parametrize("arguments", [[], ["run.log_every=1"]])
def test_forgotten_settings_file_shows_the_usage_in_short(arguments: list[str]):
    with pytest.raises(ConfigError, match=r"settings file .*\n\nusage: x CONFIG$"):
        config_from_arguments(arguments, "usage: x CONFIG\n\nlong text\n")


def run_here(
    arguments: list[str], read: str = "config_from_arguments", **variables: str
) -> tuple[subprocess.CompletedProcess[str], float]:
    """The process, and the seconds for which it had a core: other processes of the test run may hold the cores."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-c", COMMAND.format(read=read), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "arguments",
    [[DEMO, "model.hidden_size=50", "run.log_evry=2"], ["missing.yaml"], [], [DEMO], ["--help"]],
    ids=["bad-settings", "missing-file", "no-file", "wrong-world", "help"],
)
def test_answer_comes_in_under_a_second_without_torch(arguments: list[str]):
    runs = [run_here(arguments) for _ in range(3)]
    for result, _ in runs:
        assert result.returncode == (0 if arguments == ["--help"] else 2), result.stderr
        assert "Traceback" not in result.stderr
    assert min(seconds for _, seconds in runs) < 1


@pytest.mark.parametrize(
    "arguments",
    [[TASK, "task.name=sst2", "data.train=null"], ["missing.yaml"], [TASK, "parallel.tensor=3"], [TASK], ["-h"]],
    ids=["bad-settings", "missing-file", "wrong-world", "right", "help"],
)
def test_answer_about_a_task_comes_in_under_a_second_without_torch(arguments: list[str]):
    runs = [run_here(arguments, read="task_from_arguments") for _ in range(3)]
    for result, _ in runs:
        assert result.returncode == (0 if arguments in ([TASK], ["-h"]) else 2), result.stderr
        assert "Traceback" not in result.stderr
    assert min(seconds for _, seconds in runs) < 1


def test_what_a_command_writes_is_the_users_alone_and_a_stricter_umask_is_kept(tmp_path: Path):
    def write(arguments: list[str]) -> None:
        (tmp_path / arguments[0]).mkdir()
        (tmp_path / arguments[0] / "file").write_text("")

    for name, umask, folder, file in (
        ("a", 0, 0o700, 0o600),
        ("b", 0o022, 0o700, 0o600),
        ("c", 0o400, 0o300, 0o200),
    ):
        before = os.umask(umask)
        try:
            assert run_command(lambda given: write(given), usage="", arguments=[name]) == 0
            assert os.umask(umask) == umask, "as it was, after the command"
        finally:
            os.umask(before)
        paths = (tmp_path / name, tmp_path / name / "file")
        assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [folder, file]


def test_bad_environment_is_one_message():
    result, _ = run_here([DEMO], RANK="abc", WORLD_SIZE="1")
    assert result.returncode == 2
    assert result.stderr.startswith("error: environment variable RANK=abc must be an integer")


def test_a_reader_that_leaves_early_gets_no_traceback():
    """As in ``convert inspect RUN | head -1``."""
    program = (
        "import sys; from megatron_bert_tp.config.command_line import run_command\n"
        "def main(_): print('line\\n' * 99999)\n"
        "sys.exit(run_command(main, usage='', arguments=[]))"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait(20) == 141
