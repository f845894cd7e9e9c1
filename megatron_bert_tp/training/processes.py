"""This process among its peers: device, process group, mesh, memory."""

import ctypes
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_bert_tp.config.environment import LaunchEnvironment
from megatron_bert_tp.errors import LayoutError, PeerLostError
from megatron_bert_tp.parallel.collectives import maximum_over_, sum_over_
from megatron_bert_tp.parallel.mesh import MeshShape, ParallelMesh
from megatron_bert_tp.reliability.network import meeting_store, stay_on_loopback

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def choose_device(wanted: str, local_rank: int, *, option: str = "run.device") -> torch.device:
    """The device of this process: ``auto`` is a GPU where torch sees one; the GPU number is the local rank.

    ``option`` is the name under which the user gives ``wanted``.
    """
    has_gpu = torch.cuda.is_available()
    if wanted == "cpu" or (wanted == "auto" and not has_gpu):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise LayoutError(
            f"{option} is {wanted}, but local rank {local_rank} has no GPU of its own (torch sees "
            f"{torch.cuda.device_count()}); start as many processes as GPUs, or set {option}=cpu"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def process_group(environment: LaunchEnvironment, device: torch.device, timeout: timedelta) -> Iterator[None]:
    """Join the peers that torchrun started, and leave them at the end; one process needs no group.

    PeerLostError where not all of them have come in time.
    """
    if environment.world_size == 1:
        yield
        return
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.set_device(device)  # NCCL's grouped sends and receives run on the current device
    stay_on_loopback(environment)
    try:
        dist.init_process_group(
            "nccl" if is_gpu else "gloo",
            timeout=timeout,
            device_id=device if is_gpu else None,
            store=meeting_store(environment, timeout),
            rank=environment.rank,
            world_size=environment.world_size,
        )
    except dist.DistError as error:  # what the store and NCCL raise
        raise PeerLostError(
            f"rank {environment.rank} did not meet all {environment.world_size} ranks within "
            f"{timeout.total_seconds():g} s ({str(error).splitlines()[0]:.300}); see what the others say, or "
            "raise run.timeout_seconds where hosts start slowly"
        ) from error
    yield
    # After an error the process just ends: NCCL would wait here for messages of peers that wait for this rank.
    dist.destroy_process_group()


def build_mesh(
    environment: LaunchEnvironment,
    device: torch.device,
    *,
    tensor: int,
    pipeline: int,
    ends: tuple[int, ...],
    timeout: timedelta,
) -> ParallelMesh:
    """Mesh of this launch, warmed up: a communicator connects at its first message, which needs all its ranks.

    ``ends`` are the places on the pipeline that hold the first and the last stage.
    """
    if environment.world_size == 1:
        return ParallelMesh.alone()
    shape = MeshShape.of_world(environment.world_size, tensor=tensor, pipeline=pipeline, ends=ends)
    mesh = ParallelMesh.build(shape, rank=environment.rank, timeout=timeout)
    for axis in (mesh.tensor, mesh.data, mesh.pipeline, mesh.tied):
        sum_over_(torch.zeros(1, device=device), axis)
    _meet_neighbours(mesh, device)
    return mesh


def _meet_neighbours(mesh: ParallelMesh, device: torch.device) -> None:
    """Send one number through each channel: NCCL connects two ranks when they first meet, and both must wait.

    All ranks have their channels in one order, so that none wait for each other in a circle.
    """
    places = mesh.pipeline
    for (source, target), group in mesh.channels.items():
        number = torch.zeros(1, device=device)
        if places.rank == source:
            dist.send(number, places.ranks[target], group)
        else:
            dist.recv(number, places.ranks[source], group)


def end_with_launcher(environment: LaunchEnvironment) -> None:
    """Have the system send this process a SIGTERM when its launcher ends; Linux only.

    Whoever kills a launcher would else leave ranks behind that wait for each other.
    """
    if environment.is_launched and sys.platform.startswith("linux"):
        prctl = getattr(ctypes.CDLL(None), "prctl", None)
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def keep_freed_memory() -> bool:
    """Tell glibc to keep large freed buffers for the next step; returns whether it could.

    By default every activation is given back to the system and mapped anew: half a million page faults a
    step, which can take half of the time of a small model on CPU.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library than glibc
        return False
    settings = {_M_MMAP_THRESHOLD: 1 << 30, _M_TRIM_THRESHOLD: (1 << 31) - 1, _M_TOP_PAD: 1 << 26}
    accepted = [mallopt(key, value) == 1 for key, value in settings.items()]
    return all(accepted)


def peak_memory(mesh: ParallelMesh, device: torch.device) -> float:
    """Largest memory of any rank so far, in GiB: of the GPU, or resident on CPU."""
    if device.type == "cuda":
        used = float(torch.cuda.max_memory_allocated(device))
    else:
        used = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    largest = torch.tensor([used], dtype=torch.float64, device=device)
    for axis in (mesh.tensor, mesh.pipeline, mesh.data):
        maximum_over_(largest, axis)
    return largest.item() / 2**30
