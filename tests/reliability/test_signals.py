"""Real signals to real processes: requests, second thoughts, and runs that fail already."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from megatron_bert_tp.errors import ExitCode
from megatron_bert_tp.reliability.signals import SAME_SECONDS, StopRequests
from tests.sources import ROOT

# Waits in C for ever in a way that no signal interrupts, without Python's lock, as a collective does.
BLOCKED = """
import ctypes
mutex = ctypes.create_string_buffer(256)
library = ctypes.CDLL(None)
library.pthread_mutex_lock(mutex)
print("ready", flush=True)
library.pthread_mutex_lock(mutex)
"""
# Goes on until it is let go, whatever signals come.
PATIENT = """
import sys
print("ready", flush=True)
sys.stdin.readline()
print(stops.requested, flush=True)
"""
# Seconds after which a process is waited for in vain.
LONG = 30


@pytest.fixture
def start():
    processes = []

    def run(body: str, arguments: str = "", before: str = "") -> subprocess.Popen[str]:
        code = (
            "import time\nfrom megatron_bert_tp.reliability import signals\n"
            f"from megatron_bert_tp.reliability.signals import StopRequests\n{before}\n"
            "begun = time.monotonic()\n"
            "def tell(name): print('noticed', name, flush=True)\n"
            f"with StopRequests(on_signal=tell, {arguments}) as stops:\n{textwrap.indent(body, '    ')}"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def let_go(process: subprocess.Popen[str]) -> str:
    """What a patient process still says when it may end; all it said before is read."""
    output, _ = process.communicate("\n", timeout=LONG)
    assert process.returncode == 0
    return output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_a_request_and_the_run_goes_on(start, number):
    process = start(PATIENT)
    process.send_signal(number)
    assert process.stdout.readline() == f"noticed {number.name}\n"
    assert let_go(process) == f"{number.name}\n"


def test_the_first_of_several_signals_is_the_reason(start):
    process = start(PATIENT)
    for name in ("SIGUSR1", "SIGTERM"):
        process.send_signal(signal.Signals[name])
        assert process.stdout.readline() == f"noticed {name}\n"
    assert let_go(process) == "SIGUSR1\n"


def test_a_signal_is_noticed_while_the_main_thread_waits_in_c(start):
    process = start(BLOCKED)
    process.send_signal(signal.SIGTERM)
    # Python's own handlers would never run: the main thread stays where it is.
    assert process.stdout.readline() == "noticed SIGTERM\n"
    assert process.poll() is None


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interruption_ends_at_once_though_the_main_thread_waits_in_c(start, second):
    """SIGTERM is what torchrun makes of the second Ctrl-C."""
    process = start(BLOCKED, "on_end=lambda code, cause: print(int(code), cause, flush=True)")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "noticed SIGINT\n"
    time.sleep(SAME_SECONDS + 0.2)
    assert process.poll() is None
    process.send_signal(second)
    # The main thread never returns: what waited for it would wait in vain.
    assert process.wait(LONG) == ExitCode.INTERRUPTED
    assert process.stdout.read() == f"130 interrupted a second time ({second.name})\n"


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_forwarded_copy_of_the_first_interruption_counts_once(start, second):
    assert SAME_SECONDS == 0.5
    # On a busy machine half a second may pass between our two signals.
    process = start(PATIENT, before="signals.SAME_SECONDS = 60")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "noticed SIGINT\n"
    process.send_signal(second)
    assert process.stdout.readline() == f"noticed {second.name}\n"
    assert let_go(process) == "SIGINT\n"


def test_two_sigterms_are_one_request(start):
    process = start(PATIENT)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "noticed SIGTERM\n"
        time.sleep(SAME_SECONDS + 0.1)
    assert let_go(process) == "SIGTERM\n"


@pytest.mark.parametrize("fails_after", [0, 1])
def test_a_failing_run_that_is_told_to_end_ends_though_the_main_thread_waits_in_c(start, fails_after):
    """Whether it failed before the signal or fails after it."""
    process = start(BLOCKED, f"is_failing=lambda: time.monotonic() > begun + {fails_after}")
    process.send_signal(signal.SIGTERM)
    assert process.wait(LONG) == ExitCode.PEER_LOST


def test_a_hook_that_hangs_does_not_keep_a_failing_run(start):
    process = start(BLOCKED, "is_failing=lambda: True, on_end=lambda code, cause: time.sleep(60)")
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert process.wait(LONG) == ExitCode.PEER_LOST
    assert time.monotonic() - started < 10, "the hook takes 60 s"


def test_a_failing_run_that_gets_no_signal_is_left_alone(start):
    process = start("import time\nprint('ready', flush=True)\ntime.sleep(1)\n", "is_failing=lambda: True")
    assert process.wait(LONG) == 0


def test_a_wait_ends_with_a_request():
    with StopRequests() as stops:
        assert not stops.wait(0.05)
        started = time.monotonic()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stops.wait(60)
        assert time.monotonic() - started < 10
        stops.request("the launcher is gone")
        assert stops.requested == "SIGUSR1"


def test_a_request_needs_no_signal():
    with StopRequests() as stops:
        stops.request("the launcher is gone")
        assert stops.wait(0)
        assert stops.requested == "the launcher is gone"


def test_handlers_are_as_before_when_it_is_over():
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with StopRequests():
        assert all(signal.getsignal(number) not in before for number in numbers)
    assert [signal.getsignal(number) for number in numbers] == before
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    assert descriptor == -1
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
