"""Where the sockets of our ranks listen: on one node on its loopback interface, which no other machine reaches."""

import socket
from collections.abc import Iterable
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # they are, by the documentation

from megatron_bert_tp.config.environment import LaunchEnvironment, set_where_unset
from megatron_bert_tp.errors import TrainingError

LOOPBACK = "127.0.0.1"
_INTERFACES = ("lo", "lo0")  # Linux; macOS and the BSDs
_CHOICES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def stay_on_loopback(environment: LaunchEnvironment) -> None:
    """Have gloo and NCCL use the loopback interface where all ranks share a node, unless the user chose another.

    Call it before the process group is made.
    """
    interface = loopback_interface(name for _, name in socket.if_nameindex())
    if is_on_one_node(environment) and interface is not None:
        set_where_unset(dict.fromkeys(_CHOICES, interface))


def is_on_one_node(environment: LaunchEnvironment) -> bool:
    """Whether the launcher started all ranks on one machine."""
    return environment.local_world_size == environment.world_size


def loopback_interface(names: Iterable[str]) -> str | None:
    """The one of ``names`` that is the loopback interface; None where none is."""
    known = set(names)
    return next((name for name in _INTERFACES if name in known), None)


def meeting_store(environment: LaunchEnvironment, timeout: timedelta) -> Store | None:
    """The store at which the ranks of this start meet; None where torch finds one by itself.

    A launcher that keeps a store keeps it for all its starts: without names of their own, the ranks of a restart
    would read the addresses of dead ones.  Else, on one node, the first rank makes a store at the launcher's port
    that listens on loopback; torch's own listens on all interfaces, and asks nobody who he is.  ``timeout`` is
    that of waiting for it.  Errors: `TrainingError` when the port is taken.
    """
    if environment.has_store and environment.master_address is not None:
        address, port = environment.master_address, environment.master_port or 0
        kept = TCPStore(address, port, environment.world_size, is_master=False, timeout=timeout)
        return PrefixStore(f"start_{environment.restarts}", kept)
    if environment.world_size == 1 or not is_on_one_node(environment):
        return None
    port = environment.master_port or 0
    if not environment.is_first:
        return TCPStore(LOOPBACK, port, environment.world_size, is_master=False, timeout=timeout)
    return TCPStore(
        LOOPBACK,
        port,
        environment.world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=_listening(port).detach(),  # closed by the store
    )


def _listening(port: int) -> socket.socket:
    try:
        return socket.create_server((LOOPBACK, port), backlog=4096)
    except OSError as error:
        raise TrainingError(
            f"port {port} of {LOOPBACK} is taken ({error.strerror}); start again, which takes another port, or "
            "give torchrun another --master-port"
        ) from error
