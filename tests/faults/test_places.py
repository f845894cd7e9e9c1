"""Where a run meets others: its launcher, its folder, the clock, the network (rows 12, 21 and 22)."""

import os
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from megatron_bert_tp.errors import ExitCode
from tests.faults.runs import (
    Running,
    assert_ends_like,
    command,
    environment,
    launch,
    on_a_quiet_machine,
    outcome_of,
    start,
)
from tests.training.runs import ROOT

DATA, PIPELINE = "parallel.shard_optimizer=true", "parallel.pipeline=2"
# The last of two numbers of processes counts.
ONE_OF_TWO = ("--nproc-per-node=1", "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-conf=join_timeout=5")
TWO_NODES = ("--nproc-per-node=1", "--nnodes=2", "--master-port=29555")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def contents(folder: Path) -> dict[Path, bytes]:
    """All files below a folder in which nobody writes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(line: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        line, cwd=ROOT, env=environment(""), capture_output=True, text=True, timeout=90, check=False
    )


# Row 12


def test_a_wrong_number_of_processes_is_told_before_torch_is_imported(data, tmp_path):
    """Row 12: within 2 s."""
    line = [sys.executable, "-X", "importtime", "-m", "megatron_bert_tp.pretrain", str(data)]
    line += [f"run.directory={tmp_path / 'run'}", "parallel.tensor=2"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # it waits for nothing: its time is that of the processor
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= 2
    assert done.returncode == ExitCode.BAD_SETTINGS
    assert "world size = 1\n      must be a multiple of 2 = parallel.tensor (2)" in done.stderr
    assert re.search(r"\| +megatron_bert_tp\.config\.load$", done.stderr, re.MULTILINE)
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
def test_a_wrong_number_of_processes_is_told_once_under_torchrun(data, tmp_path):
    """Row 12: three ranks; torchrun itself needs some seconds to start and to end them."""
    line = command(data, f"run.directory={tmp_path / 'run'}", "parallel.tensor=2", processes=3)
    line = [part.replace("tests.faults.inject", "megatron_bert_tp.pretrain") for part in line]
    done = run(line)
    assert done.returncode == 1
    assert done.stderr.count("1 problem in the settings") == 1
    assert "start 2, 4 or 8 processes" in done.stderr


@pytest.mark.faults
def test_a_launcher_whose_fellow_does_not_come_gives_up_in_its_time(data, tmp_path):
    """Row 12 and 22: the rendezvous of two launchers, of which one is started; within 5 s and torchrun's own."""
    options = (*ONE_OF_TWO, f"--rdzv-endpoint=127.0.0.1:{free_port()}")
    line = command(data, f"run.directory={tmp_path / 'run'}", processes=2, options=options)
    began = time.monotonic()
    done = run(line)
    assert done.returncode == 1
    assert "RendezvousTimeoutError" in done.stderr
    assert time.monotonic() - began <= 30  # the seconds in which torchrun shuts its store are among them
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
@pytest.mark.parametrize("at", ["meet", "start"])
def test_a_rank_that_comes_late_is_waited_for_no_longer_than_the_timeout(data, tmp_path, at):
    """Row 12: rank 1 sleeps 40 s before it meets rank 0, and after; nobody waits that long."""
    folder = tmp_path / "run"
    late = f"slow=40@step:0,rank:1,at:{at}"
    with start(data, folder, "run.timeout_seconds=5", DATA, fault=late) as running:
        running.wait_for_fault("slow")
        began = time.time()
        ended = running.end()
    assert ended.code == 1
    assert ended.ended - began <= 5 + 5 + 2 + 4, "the silence, the margin of a message, and torchrun's own end"
    if at == "meet":
        assert "error: rank 0 did not meet all 2 ranks within " in ended.output
        assert ended.outcome == {}, "it holds no folder yet"
    else:
        assert ended.outcome["code"] in (ExitCode.PEER_LOST, ExitCode.HANG)
        assert ended.outcome["time"] - began <= 5 + 5 + 2


# Row 21


def test_a_second_job_is_refused_and_the_first_is_not_disturbed(data, tmp_path, whole):
    """Row 21: within a second of coming to the lock, which names the holder."""
    folder = tmp_path / "run"
    with start(data, folder, fault="slow=0.4@step:6,until:12,at:step", processes=1) as first:
        first.wait_for_step(5)
        first.freeze()  # it must not end before the second has come to the lock, nor finish what it saves
        before = contents(folder)
        second = on_a_quiet_machine(
            lambda: launch(data, folder, processes=1, fault="slow=0@step:0,at:meet"),
            lambda ended: ended.ended - ended.fault_times[0] <= 1 + 2,
        )
        after = contents(folder)
        first.send(signal.SIGCONT)
        ended = first.end()
    assert second.code == ExitCode.CANNOT_WRITE
    assert second.ended - second.fault_times[0] <= 1 + 2, "the lock's patience, and the end of the process"
    told = f"belongs to another job that is still running: process {first.process.pid} on {socket.gethostname()}"
    assert f"error: {folder} {told}" in second.output
    assert after == before
    assert (ended.code, ended.outcome["code"]) == (0, 0), ended.output
    assert_ends_like(folder, whole(processes=1))


@pytest.fixture
def unwritable(tmp_path) -> Iterator[Path]:
    """A folder in which not even root may write."""
    folder = tmp_path / "unwritable"
    folder.mkdir(mode=0o500)
    if os.geteuid() == 0:
        if shutil.which("chattr") is None or subprocess.run(["chattr", "+i", str(folder)]).returncode:
            pytest.skip("root may write everywhere")
        yield folder
        subprocess.run(["chattr", "-i", str(folder)], check=True)
    else:
        yield folder
    folder.chmod(stat.S_IRWXU)


@pytest.mark.faults
@pytest.mark.parametrize("processes", [1, 2])
def test_a_folder_that_cannot_be_written_is_named_before_anything_is_computed(data, unwritable, processes):
    """Row 21."""
    for folder in (unwritable, unwritable / "run"):
        ended = launch(data, folder, processes=processes)
        assert ended.code == (ExitCode.CANNOT_WRITE if processes == 1 else 1)
        assert re.search(rf"error(?: on rank 0)?: {folder}\S*: .*ermi", ended.output), ended.output
        assert "step" not in re.findall(r"^\w+", ended.output, re.MULTILINE)
        if processes == 2:
            break  # the same, at twice the price


@pytest.mark.faults
def test_a_folder_below_a_file_is_refused(data, tmp_path):
    """Row 21."""
    (tmp_path / "file").touch()
    ended = launch(data, tmp_path / "file" / "run", processes=1)
    assert ended.code == ExitCode.CANNOT_WRITE
    assert f"error: {tmp_path / 'file' / 'run'}: " in ended.output


@pytest.mark.faults
@pytest.mark.parametrize("seconds", [100_000, -100_000])
def test_a_jump_of_the_clock_changes_nothing(data, tmp_path, whole, seconds):
    """Row 21: of one rank, by a day, while limits of some seconds hold; then all files lie in the future."""
    folder = tmp_path / "run"
    limits = (DATA, "run.step_timeout_seconds=4", "run.stop_after=60s")
    jump = f"clock={seconds}@step:3,rank:1;clock={-seconds}@step:5,rank:0;slow=0.1@step:1,until:12,at:step"
    stop = "usr1@step:9,rank:0,at:optimizer;slow=0.2@step:9,rank:0,at:optimizer"
    ended = launch(data, folder, *limits, fault=f"{jump};{stop}")
    assert (ended.outcome["code"], ended.outcome["step"]) == (ExitCode.STOPPED, 9), ended.output
    soon = time.time() + seconds
    for path in folder.rglob("*"):
        os.utime(path, (soon, soon))
    again = launch(data, folder, *limits)
    assert (again.outcome["code"], again.outcome["step"]) == (0, 12), again.output
    assert "step_00000009, step 9" in again.output
    assert_ends_like(folder, whole(DATA))


@pytest.mark.faults
def test_a_slow_rename_delays_nothing_but_the_checkpoint(data, tmp_path, whole):
    """Row 21: 1 s before each manifest and before each new name; the steps go on meanwhile."""
    folder = tmp_path / "run"
    slow = "slow=1@step:1,until:12,at:commit;slow=1@step:1,until:12,at:rename"
    ended = launch(data, folder, DATA, fault=slow)
    assert (ended.code, ended.outcome["code"]) == (0, 0), ended.output
    lines = ended.output.splitlines()
    eighth = next(n for n, line in enumerate(lines) if re.match(r"step +8/12", line))
    told = next(n for n, line in enumerate(lines) if "step_00000004: " in line)
    assert eighth < told
    assert_ends_like(folder, whole(DATA))


# Row 22


@pytest.mark.faults
def test_a_port_that_is_taken_is_told_and_without_a_port_another_is_found(data, tmp_path):
    """Row 22: torchrun's own error for a port of the user's choice; by default it takes a free one."""
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        ended = launch(data, tmp_path / "run", DATA, options=(f"--master-port={port}",), seconds=60)
    assert ended.code == 1
    assert "address already in use" in ended.output
    assert not (tmp_path / "run").exists()


class Network:
    """Two network namespaces with a cable between them."""

    def __init__(self) -> None:
        number = os.getpid()
        self.names, self.cards = (f"mb{number}a", f"mb{number}b"), (f"va{number}", f"vb{number}")
        self.addresses = ("10.77.0.1", "10.77.0.2")

    def build(self) -> bool:
        """Whether it is permitted."""
        one, two = self.names
        lines = [f"netns add {one}", f"netns add {two}"]
        lines += [f"link add {self.cards[0]} netns {one} type veth peer name {self.cards[1]} netns {two}"]
        for name, card, address in zip(self.names, self.cards, self.addresses, strict=True):
            lines += [f"-n {name} addr add {address}/24 dev {card}"]
            lines += [f"-n {name} link set {each} up" for each in ("lo", card)]
        return shutil.which("ip") is not None and all(self._ip(line) == 0 for line in lines)

    def cut(self) -> float:
        """Pull the cable: nothing arrives any more, and nobody is told; when (of `time.time`)."""
        assert self._ip(f"-n {self.names[0]} link set {self.cards[0]} down") == 0
        return time.time()

    def remove(self) -> None:
        for name in self.names:
            self._ip(f"netns del {name}")

    @staticmethod
    def _ip(line: str) -> int:
        return subprocess.run(["ip", *line.split()], capture_output=True, check=False).returncode


@pytest.fixture
def network() -> Iterator[Network]:
    built = Network()
    try:
        if not built.build():
            pytest.skip("network namespaces may not be made")
        yield built
    finally:
        built.remove()


@pytest.mark.faults
def test_ranks_that_a_network_parts_end_within_the_timeout(data, tmp_path, network):
    """Row 22: two launchers in two networks; within the step's timeout and 2 s."""
    folder = tmp_path / "run"
    given = (PIPELINE, "run.step_timeout_seconds=4", "optimizer.steps=200", f"run.directory={folder}")
    with ExitStack() as launched:
        nodes = []
        for node, (name, card) in enumerate(zip(network.names, network.cards, strict=True)):
            place = (*TWO_NODES, f"--node-rank={node}", f"--master-addr={network.addresses[0]}")
            line = command(data, *given, processes=2, options=place)
            variables = {**environment("slow=0.1@step:1,until:200,at:step"), "GLOO_SOCKET_IFNAME": card}
            output = folder if node == 0 else tmp_path / "other"
            nodes += [launched.enter_context(Running(["ip", "netns", "exec", name, *line], output, variables))]
        nodes[0].wait_for_step(5)
        cut = network.cut()
        ends = [running.end() for running in nodes]
    outcome = outcome_of(folder)
    assert outcome["code"] == ExitCode.HANG, ends[0].output
    assert outcome["time"] - cut <= 4 + 2
    assert [ended.code for ended in ends] == [1, 1]
    assert max(ended.ended for ended in ends) - cut <= 4 + 2 + 10, "both launchers too"
    assert re.match(r"hang: rank \d .*; its last action, [\d.]+ s ago in step \d+: ", outcome["cause"])
