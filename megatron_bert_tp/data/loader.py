"""Batches of the coming steps, made in the background while the model computes."""

import atexit
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from megatron_bert_tp.data.stop_signals import held_back_from_children, ignore_stop_signals
from megatron_bert_tp.data.tensors import Tensors
from megatron_bert_tp.errors import DataError, MegatronBertError

_STEPS_AHEAD = 2  # of a thread, or of each process
_LAST_SECONDS = 5.0  # for the batch that the thread makes when the process ends

Batch = TypeVar("Batch", bound=Tensors)
Make = Callable[[int], Sequence[Batch]]
"""From the samples done to the microbatches of the step that follows them."""
SizeOf = Callable[[int], int]
"""From the samples done to the samples of the step that follows them, which never become fewer."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How batches are made ahead."""

    num_workers: int
    """Processes; 0 is one thread of this process, enough where the model computes on CPU."""
    pins_memory: bool
    """Whether batches are laid into page-locked memory, for a GPU."""
    timeout_seconds: float


class StepLoader(Generic[Batch]):
    """The microbatches of the steps of a run, one step after another.

    What a step gets depends on its number alone: neither the workers nor what was taken before changes it.
    """

    def __init__(self, make: Make[Batch], *, size_of: SizeOf, end: int, loading: Loading):
        """``end`` is the number of samples of the whole run: nothing is made ahead beyond it."""
        self._make, self._size_of, self._end, self._loading = make, size_of, end, loading
        self._next: int | None = None
        self._steps: Iterator[Sequence[Batch]] = iter(())

    def take(self, samples_done: int) -> Sequence[Batch]:
        """Microbatches of the step that follows ``samples_done`` samples.

        DataError when a process that makes them has died, or when they do not come in time.
        """
        if samples_done != self._next or samples_done >= self._end:
            end = max(self._end, samples_done + self._size_of(samples_done))
            self._steps = _ahead(self._make, _Starts(samples_done, end, self._size_of), self._loading)
        self._next = samples_done + self._size_of(samples_done)
        return next(self._steps)


class _Starts(Sequence[int]):
    """Samples done before each step from ``first`` on: as long as sizes grow a list, and from then on a range."""

    def __init__(self, first: int, end: int, size_of: SizeOf):
        full = size_of(end)
        self._growing: list[int] = []
        while first < end and size_of(first) != full:
            self._growing.append(first)
            first += size_of(first)
        self._even = range(first, end, full)

    def __len__(self) -> int:
        return len(self._growing) + len(self._even)

    def __getitem__(self, index: int) -> int:  # type: ignore[override]
        if index < len(self._growing):
            return self._growing[index]
        return self._even[index - len(self._growing)]


def _ahead(make: Make[Batch], numbers: Sequence[int], loading: Loading) -> Iterator[Sequence[Batch]]:
    return (_in_processes if loading.num_workers else _in_thread)(make, numbers, loading)


def _in_thread(make: Make[Batch], numbers: Sequence[int], loading: Loading) -> Iterator[Sequence[Batch]]:
    def made(number: int) -> Sequence[Batch]:
        batches = make(number)
        return [batch.pin_memory() for batch in batches] if loading.pins_memory else batches

    worker = _Worker(made)
    waiting: deque[Future[Sequence[Batch]]] = deque()
    try:
        for number in numbers:
            waiting.append(worker.ask(number))
            if len(waiting) > _STEPS_AHEAD:
                yield _result(waiting.popleft(), loading)
        while waiting:
            yield _result(waiting.popleft(), loading)
    finally:
        for future in waiting:
            future.cancel()
        worker.leave()


class _Worker(Generic[Batch]):
    """A thread that makes batches in turn.

    Not a pool's: the interpreter ends only after a pool's threads, even where one waits for a file system that
    does not answer.
    """

    def __init__(self, make: Make[Batch]):
        self._asked: SimpleQueue[tuple[int, Future[Sequence[Batch]]] | None] = SimpleQueue()
        self._make = make
        self._thread = Thread(target=self._serve, name="batches", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def ask(self, number: int) -> Future[Sequence[Batch]]:
        """What ``make`` gives for ``number``, once it is made."""
        future: Future[Sequence[Batch]] = Future()
        self._asked.put((number, future))
        return future

    def leave(self) -> None:
        """Let the thread end when it has made what it is making."""
        self._asked.put(None)

    def _end(self) -> None:
        # A thread that is still in torch when the interpreter is taken down may end the process with a crash.
        self.leave()
        self._thread.join(_LAST_SECONDS)

    def _serve(self) -> None:
        while (task := self._asked.get()) is not None:
            number, future = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._make(number))
            except BaseException as error:
                future.set_exception(error)  # raised again by the step that needs it


def _result(made: Future[Sequence[Batch]], loading: Loading) -> Sequence[Batch]:
    try:
        return made.result(loading.timeout_seconds)
    except TimeoutError as error:
        raise DataError(_too_slow(loading)) from error


_Made = Sequence[Batch] | MegatronBertError


class _Steps(Dataset[_Made[Batch]], Generic[Batch]):
    """The steps of a run for torch's loader; what a user can mend comes as a value, or torch would wrap it."""

    def __init__(self, make: Make[Batch], numbers: Sequence[int]):
        self._make, self._numbers = make, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, step: int) -> _Made[Batch]:
        try:
            return self._make(self._numbers[step])
        except MegatronBertError as error:
            return error


def _in_processes(make: Make[Batch], numbers: Sequence[int], loading: Loading) -> Iterator[Sequence[Batch]]:
    loader = DataLoader(
        _Steps(make, numbers),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=loading.num_workers,
        prefetch_factor=_STEPS_AHEAD,
        pin_memory=loading.pins_memory,
        timeout=loading.timeout_seconds,
        worker_init_fn=ignore_stop_signals,
        multiprocessing_context="spawn",  # the threads of gloo, NCCL and OpenMP do not survive a fork
    )
    try:
        with held_back_from_children():
            steps = iter(loader)
        for made in steps:
            if isinstance(made, MegatronBertError):
                raise made
            yield made
    except RuntimeError as error:
        if str(error).startswith("Caught "):  # what the process itself has raised
            raise
        if "timed out" in str(error):
            raise DataError(_too_slow(loading)) from error
        raise DataError(
            f"a process that makes batches has ended ({error}); if memory is short, lower run.data_workers "
            f"({loading.num_workers}), or set it to 0"
        ) from error


def _as_it_is(made: _Made[Batch]) -> _Made[Batch]:
    return made


def _too_slow(loading: Loading) -> str:
    return (
        f"no batch came within run.timeout_seconds ({loading.timeout_seconds:g}); look at the file system of "
        "data.corpus, or raise run.timeout_seconds"
    )
