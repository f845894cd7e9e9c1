"""Hangs of real processes: found in time, told once, and nobody left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from megatron_bert_tp.errors import ExitCode
from megatron_bert_tp.reliability import hang, watchdog
from megatron_bert_tp.reliability.actions import Kind
from megatron_bert_tp.reliability.board import Row
from megatron_bert_tp.reliability.limits import Limits, step_limit
from megatron_bert_tp.reliability.process_state import Process
from megatron_bert_tp.reliability.slot import Action, State
from megatron_bert_tp.reliability.watchdog import Silence
from tests.faults.runs import on_a_quiet_machine
from tests.reliability.watched import LIMITS
from tests.sources import ROOT

SLOW = 3.0
"""Pace where nobody may count as hanging: other work on the machine takes less than the seconds that are left."""
MESSAGE = "waits for: gradient of microbatch 2 from rank 1 to rank 0"


@dataclass
class Ended:
    """How the processes of a test ended; seconds from the last action to the end of the last of them."""

    codes: list[int]
    output: str
    errors: str
    seconds: float


@pytest.fixture
def watched(tmp_path):
    all_processes: list[subprocess.Popen[str]] = []

    def start(*acts: str, pace: float = 1.0) -> list[subprocess.Popen[str]]:
        processes: list[subprocess.Popen[str]] = []
        board = tmp_path / f"board{len(all_processes)}"
        with (tmp_path / "errors").open("w") as errors:
            for rank, act in enumerate(acts):
                command = [sys.executable, "-m", "tests.reliability.watched", board, rank, len(acts), pace, act]
                process = subprocess.Popen(
                    [str(word) for word in command],
                    cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                )  # fmt: skip
                processes.append(process)
                all_processes.append(process)
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        return processes

    def run(*acts: str, pace: float = 1.0) -> Ended:
        processes = start(*acts, pace=pace)
        started = time.monotonic()
        outputs = [process.communicate(timeout=40)[0] for process in processes]
        seconds = time.monotonic() - started
        codes = [process.returncode for process in processes]
        return Ended(codes, "".join(outputs), (tmp_path / "errors").read_text(), seconds)

    run.start = start
    yield run
    for process in all_processes:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def test_a_hang_ends_all_ranks_and_is_told_once_with_the_stacks_of_the_living(watched):
    # A rank that is too slow to show its stacks is killed.
    ended = on_a_quiet_machine(
        lambda: watched("waits", "stuck", "waits"), lambda ended: -signal.SIGKILL not in ended.codes
    )
    assert ended.codes == [ExitCode.HANG] * 3
    assert ended.output.count("told by") == 1
    # The one that computes, and not those that wait for it.
    assert "hang: rank 1 " in ended.output
    assert "in step 7: forward of microbatch 2" in ended.output
    for rank in range(3):
        assert ended.errors.count(f"--- rank {rank}, ") == 1
    assert "never_ending_forward" in ended.errors
    head, *rows, last = ended.errors.partition("--- ranks of this host\n")[2].splitlines()
    assert head.split() == ["rank", "process", "step", "silent", "state", "last", "action"]
    assert [(row.split()[0], row.split()[2], row.split()[5]) for row in rows] == [
        ("0", "7", "running"), ("1", "7", "running"), ("2", "7", "running")
    ]  # fmt: skip
    assert MESSAGE in rows[0]
    assert "forward of microbatch 2" in rows[1]
    assert last.startswith("hang: rank 1 ")


def test_a_hang_is_over_two_seconds_after_the_limit(watched):
    latest = LIMITS.step + 2
    ended = on_a_quiet_machine(lambda: watched("waits", "stuck"), lambda ended: ended.seconds < latest)
    assert 0.9 * LIMITS.step < ended.seconds < latest


def test_a_stopped_rank_is_named_and_killed(watched):
    latest = LIMITS.step + 2
    ended = on_a_quiet_machine(lambda: watched("waits", "stops"), lambda ended: ended.seconds < latest)
    assert ended.codes == [ExitCode.HANG, -signal.SIGKILL]
    assert "is stopped; its last action" in ended.output
    assert "in step 7: forward of microbatch 2" in ended.output
    assert ended.seconds < latest


def test_a_rank_that_keeps_pythons_lock_is_killed_after_it_has_shown_its_stack(watched):
    # It has 0.15 s to show its stack.
    ended = on_a_quiet_machine(
        lambda: watched("waits", "keeps_python_locked"), lambda ended: "keeps_python_locked" in ended.errors
    )
    assert ended.codes[0] == ExitCode.HANG
    assert ended.codes[1] < 0
    assert "keeps_python_locked" in ended.errors


def test_a_rank_that_has_died_is_named(watched):
    ended = watched("waits", "dies")
    assert ended.codes == [ExitCode.HANG, -signal.SIGKILL]
    assert "is gone; its last action" in ended.output
    assert "optimizer" in ended.output


def test_whoever_waits_for_a_rank_that_saves_is_excused(watched):
    assert watched("saves", "agrees_late", pace=SLOW).codes == [0, 0]


def test_a_hang_is_found_while_another_rank_saves(watched):
    ended = on_a_quiet_machine(lambda: watched("saves", "stuck"), lambda ended: ended.seconds < LIMITS.long)
    assert ended.codes[1] == ExitCode.HANG
    assert ended.seconds < LIMITS.long


def test_whoever_goes_on_is_not_silent(watched):
    assert watched("computes_for_long", pace=SLOW).codes == [0]


def test_a_run_ends_though_nobody_takes_its_words(watched):
    latest = LIMITS.step + 2
    ended = on_a_quiet_machine(lambda: watched("says_nothing_more", "stops"), lambda ended: ended.seconds < latest)
    assert ended.codes == [ExitCode.HANG, -signal.SIGKILL]
    assert ended.seconds < latest


def test_a_run_that_was_stopped_as_a_whole_goes_on(watched):
    processes = watched.start("computes_for_long", "computes_for_long", pace=SLOW)
    time.sleep(0.5)
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
        found = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert found.si_code == os.CLD_STOPPED, "it has ended already"
    time.sleep(2 * SLOW * LIMITS.step)
    for process in processes:
        os.kill(process.pid, signal.SIGCONT)
    assert [process.wait(20) for process in processes] == [0, 0]


def test_a_finder_that_is_killed_is_replaced(watched):
    ended = watched("waits", "stuck", "finds_a_hang_and_dies", pace=SLOW)
    assert ended.codes == [ExitCode.HANG, ExitCode.HANG, -signal.SIGKILL]
    assert ended.output.count("told by") == 1
    assert "hang: rank 2 " in ended.output
    waited = re.findall(r"has waited for (.*?) s", ended.output)
    assert float(waited[0]) < SLOW * LIMITS.step, "it has found no hang itself"


def test_the_end_of_the_launcher_is_noticed_once(tmp_path):
    code = """
import subprocess, sys
child = '''
import os, time
from megatron_bert_tp.reliability.board import Board
from megatron_bert_tp.reliability.limits import Limits
from megatron_bert_tp.reliability.watchdog import Watchdog
told = []
with Watchdog(Board.alone(), Limits(step=9, long=9), on_hang=print, on_orphaned=lambda: told.append(1),
              launcher=os.getppid()):
    print("ready", flush=True)
    deadline = time.monotonic() + 30
    while not told and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(1)  # it looks four times more
open(OUT, "w").write(str(len(told)))
'''
child = child.replace("OUT", repr(sys.argv[1]))
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
process.stdout.readline()
"""
    result = tmp_path / "result"
    subprocess.run([sys.executable, "-c", code, str(result)], cwd=ROOT, timeout=30, check=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (result.exists() and result.read_text()):
        time.sleep(0.05)
    assert result.read_text() == "1"


class Clock:
    """Stands in for the module ``time``; it goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def row(self, kind: Kind, *, ago: float = 0.0) -> Row:
        """A rank that lives and has begun an action so long ago."""
        return Row(0, Process.own(), State.ALIVE, Action(1, self.now - ago, 7, kind, ""), self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    stand_in = Clock()
    for module in (watchdog, hang):
        monkeypatch.setattr(module, "time", stand_in)
    return stand_in


@pytest.mark.parametrize(
    ("peer", "own", "excuses"),
    [
        ((Kind.SAVING, 7, 0), (Kind.AGREEMENT, 7), True),
        ((Kind.SAVING, 7, 10), (Kind.AGREEMENT, 7), False),  # it hangs itself
        ((Kind.SAVING, 7, 0), (Kind.FORWARD, 7), False),  # it is ahead, and waits
        ((Kind.SAVING, 7, 0), (Kind.FORWARD, 8), True),
        ((Kind.DATA, 7, 0), (Kind.FORWARD, 7), True),
        ((Kind.DATA, 8, 0), (Kind.GRADIENTS, 7), False),
        ((Kind.FORWARD, 7, 0), (Kind.MESSAGES, 7), False),
    ],
)
def test_a_peer_excuses_who_waits_for_it_and_no_other(peer, own, excuses):
    kind, step, ago = peer
    found = LIMITS.excuses(Action(1, 100 - ago, step, kind, ""), Action(1, 99, own[1], own[0], ""), now=100)
    assert found is excuses


def test_silence_is_not_counted_while_excused_and_goes_on_afterwards(clock):
    """Looks 1/8 s apart: 3/8 s are excused, and the limit is passed 3/8 s later."""
    silence, limits = Silence(), Limits(step=0.25, long=5)
    found = []
    for is_excused in (True, True, True, False, False, False, False):
        clock.now += 0.125
        peers = [clock.row(Kind.SAVING)] if is_excused else []
        found.append(silence.look(clock.row(Kind.AGREEMENT, ago=0.125), peers, limits))
    assert found == [None] * 5 + [0.25] * 2


def test_an_excuse_is_not_for_ever(clock):
    """It ends when both limits are passed, 3/8 s after the action has begun with the first look."""
    silence, limits = Silence(), Limits(step=0.125, long=0.25)
    found = []
    for _ in range(5):
        clock.now += 0.125
        found.append(silence.look(clock.row(Kind.AGREEMENT), [clock.row(Kind.SAVING)], limits))
    assert found == [None] * 4 + [0.125]


@pytest.mark.parametrize(
    ("given", "median", "seconds"),
    [(None, None, 600), (None, 1.0, 60), (None, 9.0, 90), (None, 100.0, 600), (5.0, 9.0, 5), (900.0, 1.0, 600)],
)
def test_a_step_may_take_ten_median_steps_and_a_minute_at_least(given, median, seconds):
    assert step_limit(given, median, longest=600) == seconds
