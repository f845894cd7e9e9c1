"""exit.json keeps the first cause of an end, and its entry point turns it into an exit code."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bert_tp import outcome as entry_point
from megatron_bert_tp.config.command_line import run_command
from megatron_bert_tp.errors import ExitCode
from megatron_bert_tp.reliability.outcome import NAME, Outcome, OutcomeFile
from tests.sources import ROOT

SETTINGS = str(ROOT / "configs" / "demo.yaml")
HUNG = Outcome(code=ExitCode.HANG, cause="rank 1 is silent", rank=1, step=7, checkpoint="runs/a", next="again")
CLAIM = """
import sys
from pathlib import Path
from megatron_bert_tp.errors import ExitCode
from megatron_bert_tp.reliability.outcome import Outcome, OutcomeFile
sys.stdin.readline()
print(OutcomeFile(Path(sys.argv[1])).claim(Outcome(code=ExitCode.HANG, cause=sys.argv[2])))
"""


@pytest.fixture
def told(tmp_path, capsys) -> Callable[..., tuple[int, str, str]]:
    """Exit code, output and errors of the entry point for a run in the folder of the test."""

    def _told(*options: str, overrides: tuple[str, ...] = ()) -> tuple[int, str, str]:
        arguments = [*options, SETTINGS, f"run.directory={tmp_path}", *overrides]
        code = run_command(entry_point.main, usage=entry_point.USAGE, arguments=arguments)
        said = capsys.readouterr()
        return code, said.out, said.err

    return _told


def test_what_is_claimed_is_read(tmp_path):
    file = OutcomeFile(tmp_path)
    assert file.read() is None
    assert file.claim(HUNG)
    assert file.read() == HUNG
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_of_many_processes_that_claim_at_once_one_is_the_first(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(tmp_path), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("now\n")
        process.stdin.flush()
    answers = [process.communicate()[0].strip() for process in processes]
    assert sorted(answers) == ["False"] * 3 + ["True"]
    outcome = OutcomeFile(tmp_path).read()
    assert outcome is not None
    assert outcome.cause == str(answers.index("True"))


def test_what_is_cleared_can_be_claimed_again(tmp_path):
    file = OutcomeFile(tmp_path)
    assert file.claim(HUNG)
    assert not file.claim(HUNG)
    file.clear()
    file.clear()
    assert file.claim(HUNG)


def test_where_nothing_can_be_written_every_process_is_the_first(tmp_path):
    assert OutcomeFile(tmp_path / "none").claim(HUNG)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"null", b"[]", b"{}", b'{"code": "6"}', b'{"code": 6.5}', b'{"code": 99}', b"\xff",
        b"[" * 60_000, b'{"code": ' + b"9" * 5000 + b"}", b'{"code": 0, "cause": "' + b"x" * 70_000,
    ],
    ids=lambda content: repr(content[:20]),
)  # fmt: skip
def test_a_damaged_file_is_no_outcome(tmp_path, told, content):
    (tmp_path / NAME).write_bytes(content)
    assert OutcomeFile(tmp_path).read() is None
    assert told()[0] == 1


@pytest.mark.parametrize("code", list(ExitCode))
def test_the_entry_point_exits_with_the_code_of_the_run_and_tells_it_in_one_line(tmp_path, told, code):
    OutcomeFile(tmp_path).claim(Outcome(code=code, cause="a cause", rank=1, step=7))
    exit_code, line, error = told()
    assert (exit_code, error) == (code, "")
    assert line.startswith("ended: ")
    assert line.count("\n") == 1
    assert f"code={int(code)} rank=1 step=7 checkpoint=none" in line


def test_without_an_outcome_the_code_is_1_and_never_0(told, tmp_path):
    code, line, error = told()
    assert (code, line) == (1, "")
    assert f"no rank has written {tmp_path}/exit.json" in error


def test_an_outcome_counts_only_when_it_is_another_than_the_marked_one(tmp_path, told):
    file = OutcomeFile(tmp_path)
    assert told("--mark") == (0, "none\n", "")
    assert told("--since", "none")[0] == 1
    file.claim(HUNG)
    assert told("--since=none")[0] == ExitCode.HANG
    mark = told("--mark")[1].strip()
    assert told("--since", mark)[0] == 1
    file.clear()
    file.claim(Outcome(code=ExitCode.FINISHED, cause="finished"))
    assert told("--since", mark)[0] == 0


def test_a_clock_that_was_set_back_changes_nothing(tmp_path, told):
    file = OutcomeFile(tmp_path)
    file.claim(HUNG)
    mark = told("--mark")[1].strip()
    file.clear()
    file.claim(HUNG)
    os.utime(file.path, (1, 1))
    assert told(f"--since={mark}")[0] == ExitCode.HANG


def test_settings_are_checked_with_the_processes_where_their_number_is_known(told):
    assert told("--processes", "4", "--mark")[0] == 0
    assert told("--processes", "gpu", "--mark")[0] == 0
    code, _, error = told("--processes=3", "--mark")
    assert code == ExitCode.BAD_SETTINGS
    assert "must be a multiple of 4" in error
    assert told("--mark", overrides=("model.hidden_sise=3",))[0] == ExitCode.BAD_SETTINGS


@pytest.mark.parametrize("arguments", [[], ["--mark"], ["--since"], ["--none", SETTINGS], ["--mark", "none.yaml"]])
def test_wrong_arguments_are_one_message(arguments, capsys):
    code = run_command(entry_point.main, usage=entry_point.USAGE, arguments=arguments)
    assert code == ExitCode.BAD_SETTINGS
    assert capsys.readouterr().err.startswith("error: ")


def test_the_entry_point_takes_no_torch():
    code = f"import sys; from megatron_bert_tp.outcome import main; main(['--mark', {SETTINGS!r}]); "
    check = "heavy = {'torch', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code + check], check=True, capture_output=True)


def test_the_file_is_the_users_alone_when_a_command_writes_it(tmp_path):
    before = os.umask(0o022)
    try:
        run_command(lambda _: int(OutcomeFile(tmp_path).claim(HUNG)), usage="", arguments=[])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / NAME).stat().st_mode) == 0o600
    assert json.loads(Path(tmp_path / NAME).read_text())["code"] == 6
