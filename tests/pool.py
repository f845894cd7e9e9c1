"""Worker processes that are started once a test run and lend themselves as ranks of a process group."""

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

GROUP_TIMEOUT = timedelta(seconds=180)
CALL_TIMEOUT = 240


def _serve(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        rank, size, store, work = pickle.loads(pipe.recv_bytes())
        try:
            answer = (True, _run_as_rank(rank, size, store, *work))
        except BaseException:
            answer = (False, f"rank {rank} of {size}:\n{traceback.format_exc()}")
        pipe.send_bytes(pickle.dumps(answer))


def _run_as_rank(
    rank: int, size: int, store: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=GROUP_TIMEOUT
    )
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()


class RankPool:
    """``pool.run(n, function, *arguments)`` calls the function on n real gloo ranks and returns n results."""

    def __init__(self) -> None:
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._directory = tempfile.TemporaryDirectory(prefix="ranks-")
        self._calls = 0

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        self._grow(size)
        self._calls += 1
        store = str(Path(self._directory.name) / f"store{self._calls}")
        pipes = [pipe for _, pipe in self._workers[:size]]
        for rank, pipe in enumerate(pipes):
            pipe.send_bytes(pickle.dumps((rank, size, store, (function, arguments))))
        answers = self._answers(pipes)
        return [answers[pipe] for pipe in pipes]

    def _answers(self, pipes: list[Connection]) -> dict[Connection, Any]:
        """Results by pipe; the first failure ends the workers, since its peers may wait for it for long."""
        answers: dict[Connection, Any] = {}
        while len(answers) < len(pipes):
            ready = wait([pipe for pipe in pipes if pipe not in answers], timeout=CALL_TIMEOUT)
            if not ready:
                self._end_workers()
                raise TimeoutError(f"no rank answered for {CALL_TIMEOUT} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                succeeded, result = pickle.loads(pipe.recv_bytes())
                if not succeeded:
                    self._end_workers()
                    raise AssertionError(result)
                answers[pipe] = result
        return answers

    def _grow(self, size: int) -> None:
        context = SpawnContext()
        os.environ["OMP_NUM_THREADS"] = "1"
        while len(self._workers) < size:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            self._workers.append((process, here))

    def close(self) -> None:
        self._end_workers()
        self._directory.cleanup()

    def _end_workers(self) -> None:
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers = []
