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

# Waits in C for 20 s in a way that no signal interrupts, without Python's lock, as a collective does.
BLOCKED = """
import ctypes
mutex = ctypes.create_string_buffer(256)
library = ctypes.CDLL(None)
library.pthread_mutex_lock(mutex)
print("ready", flush=True)
library.pthread_mutex_lock(mutex)
"""
PATIENT = """
import time
print("ready", flush=True)
deadline = time.monotonic() + 20
while stops.requested is None and time.monotonic() < deadline:
    time.sleep(0.02)
time.sleep(REST)
print(stops.requested, flush=True)
"""


@pytest.fixture
def start():
    processes = []

    def run(body: str, arguments: str = "") -> subprocess.Popen[str]:
        code = (
            "import time\nfrom megatron_bert_tp.reliability.signals import StopRequests\n"
            "begun = time.monotonic()\n"
            "def tell(name): print('noticed', name, flush=True)\n"
            f"with StopRequests(on_signal=tell, {arguments}) as stops:\n{textwrap.indent(body, '    ')}"
        )
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_a_request_and_the_run_goes_on(start, number):
    process = start(PATIENT.replace("REST", "0.1"))
    process.send_signal(number)
    output, _ = process.communicate(timeout=10)
    assert output == f"noticed {number.name}\n{number.name}\n"
    assert process.returncode == 0


def test_the_first_of_several_signals_is_the_reason(start):
    process = start(PATIENT.replace("REST", "0.6"))
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "noticed SIGUSR1\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=10)[0] == "noticed SIGTERM\nSIGUSR1\n"


def test_a_signal_is_noticed_while_the_main_thread_waits_in_c(start):
    process = start(BLOCKED)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert process.stdout.readline() == "noticed SIGTERM\n"
    assert time.monotonic() - started < 1
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
    started = time.monotonic()
    assert process.wait(5) == ExitCode.INTERRUPTED
    assert time.monotonic() - started < 1
    assert process.stdout.read() == f"130 interrupted a second time ({second.name})\n"


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_forwarded_copy_of_the_first_interruption_counts_once(start, second):
    process = start(PATIENT.replace("REST", "0.8"))
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "noticed SIGINT\n"
    process.send_signal(second)
    assert process.communicate(timeout=10)[0] == f"noticed {second.name}\nSIGINT\n"
    assert process.returncode == 0


def test_two_sigterms_are_one_request(start):
    process = start(PATIENT.replace("REST", "1.2"))
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "noticed SIGTERM\n"
        time.sleep(SAME_SECONDS + 0.1)
    assert process.communicate(timeout=10)[0] == "SIGTERM\n"
    assert process.returncode == 0


@pytest.mark.parametrize("fails_after", [0, 1])
def test_a_failing_run_that_is_told_to_end_ends_within_a_second(start, fails_after):
    """Whether it failed before the signal or fails after it."""
    process = start(BLOCKED, f"is_failing=lambda: time.monotonic() > begun + {fails_after}")
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == ExitCode.PEER_LOST


def test_a_hook_that_hangs_does_not_keep_a_failing_run(start):
    process = start(BLOCKED, "is_failing=lambda: True, on_end=lambda code, cause: time.sleep(60)")
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert process.wait(5) == ExitCode.PEER_LOST
    assert time.monotonic() - started < 1.2


def test_a_failing_run_that_gets_no_signal_is_left_alone(start):
    process = start("import time\nprint('ready', flush=True)\ntime.sleep(1)\n", "is_failing=lambda: True")
    assert process.wait(5) == 0


def test_a_wait_ends_with_a_request():
    with StopRequests() as stops:
        assert not stops.wait(0.05)
        started = time.monotonic()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stops.wait(10)
        assert time.monotonic() - started < 1
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
