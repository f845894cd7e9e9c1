"""On one node the sockets of our ranks listen on the loopback interface, looked up by process id."""

import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from megatron_bert_tp.config.environment import LaunchEnvironment
from megatron_bert_tp.errors import TrainingError
from megatron_bert_tp.reliability.network import (
    is_on_one_node,
    loopback_interface,
    meeting_store,
    stay_on_loopback,
)
from tests.sources import ROOT

# Each rank meets the others, and writes where it listens and where its parent, torchrun, does.
SCRIPT = """
import os, sys
from datetime import timedelta
from pathlib import Path
import torch
from megatron_bert_tp.config.environment import read_environment
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.training.processes import build_mesh, process_group
from tests.reliability.sockets import listening, listens_beyond_loopback

environment, cpu, timeout = read_environment(), torch.device("cpu"), timedelta(seconds=60)
with process_group(environment, cpu, timeout):
    Agreement.of_world(timeout).wait()
    build_mesh(environment, cpu, tensor=2, pipeline=1, ends=(0,), timeout=timeout)
    seen = [len(listening(os.getpid())), len(listening(os.getppid()))]
    beyond = [*listens_beyond_loopback(os.getpid())], [*listens_beyond_loopback(os.getppid())]
    chosen = [os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")]
    (Path(sys.argv[1]) / f"rank{environment.rank}").write_text(repr((seen, beyond, chosen)))
    Agreement.of_world(timeout).wait()
"""
# What is seen of four kinds of sockets, a line for each.
LISTENING = """
import os, socket
from tests.reliability.sockets import listening, listens_beyond_loopback

def beyond():
    return sorted(listens_beyond_loopback(os.getpid()))

print(beyond())
with socket.create_server(("0.0.0.0", 0)), socket.create_server(("127.0.0.1", 0)):
    print(sorted(listening(os.getpid())), beyond())
with socket.create_server(("::", 0), family=socket.AF_INET6):
    print(beyond())
with socket.create_server(("::1", 0), family=socket.AF_INET6):
    print(beyond())
"""
PRIVATE = ("--rdzv-backend=c10d", "--rdzv-conf=store_type=file", "--local-addr=127.0.0.1", "--nnodes=1")
"""As launch/torchrun.sh has it."""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def launched(folder: Path, *options: str, **variables: str) -> list[tuple[list[int], list[list[str]], list[str]]]:
    """What each of two ranks has written."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *options, str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [*command, str(folder)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return [eval((folder / f"rank{rank}").read_text()) for rank in range(2)]


def test_under_a_plain_torchrun_all_sockets_of_the_ranks_are_on_loopback(tmp_path):
    for (own, _), (beyond, beyond_of_torchrun), chosen in launched(tmp_path, "--standalone"):
        assert own > 0
        assert beyond == []
        assert chosen == ["lo", "lo"]
        # What remains, and why there is launch/torchrun.sh; when torch has mended it, docs/security.md can say so.
        assert beyond_of_torchrun in (["::"], ["0.0.0.0"])


def test_as_the_launch_script_starts_them_torchrun_listens_nowhere_and_the_ranks_on_loopback(tmp_path):
    folder = tempfile.mkdtemp(dir=tmp_path)
    options = (*PRIVATE, f"--rdzv-endpoint={folder}/meeting")
    for (own, of_torchrun), (beyond, _), _ in launched(tmp_path, *options, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"):
        assert own > 0
        assert of_torchrun == 0
        assert beyond == []


def test_an_interface_that_the_user_has_chosen_is_kept(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    stay_on_loopback(place(world_size=4))
    assert "GLOO_SOCKET_IFNAME" not in os.environ, "several nodes must reach each other"
    stay_on_loopback(place())
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "eth7")


def test_what_listens_is_seen():
    """The instrument itself: a socket on all interfaces is told, in both families."""
    # A process of its own: in this one something of another test may listen already.
    done = subprocess.run(
        [sys.executable, "-c", LISTENING], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines() == ["[]", "['0.0.0.0', '127.0.0.1'] ['0.0.0.0']", "['::']", "[]"]


@pytest.mark.parametrize(
    ("names", "found"),
    [(["eth0", "lo"], "lo"), (["lo0", "en0"], "lo0"), (["eth0", "local"], None), ([], None)],
)
def test_the_loopback_interface_is_found_by_its_name(names, found):
    assert loopback_interface(names) == found


def test_this_machine_has_one():
    assert loopback_interface(name for _, name in socket.if_nameindex()) == "lo"


def place(**values: object) -> LaunchEnvironment:
    return LaunchEnvironment(**{"world_size": 2, "local_world_size": 2, "is_launched": True, **values})


def test_several_nodes_are_not_one():
    assert is_on_one_node(place())
    assert not is_on_one_node(place(world_size=4))


@pytest.mark.parametrize("values", [{"world_size": 4}, {"world_size": 1, "local_world_size": 1}])
def test_the_store_of_several_nodes_is_left_to_torch(values):
    assert meeting_store(place(master_port=1, **values), timedelta(seconds=1)) is None


def test_the_launchers_store_has_names_of_their_own_for_each_start():
    """Else the ranks of a restart would find the addresses of dead ones."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    at = {"has_store": True, "master_address": "127.0.0.1", "master_port": server.port}
    first, again = (
        meeting_store(replace(place(**at), restarts=restarts), timedelta(seconds=5)) for restarts in (0, 1)
    )
    first.set("address", "of the dead")
    assert not again.check(["address"])
    assert first.check(["address"])
    del first, again, server  # what listens would be seen by later tests


def test_a_port_that_is_taken_is_one_message():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(TrainingError, match=f"port {port} of 127.0.0.1 is taken .*start again"):
            meeting_store(place(master_port=port), timedelta(seconds=1))
