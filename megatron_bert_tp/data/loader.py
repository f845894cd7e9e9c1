"""Batches of the coming steps, made in the background while the model computes."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch.utils.data import DataLoader, Dataset

from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.errors import DataError

_STEPS_AHEAD = 2  # of a thread, or of each process

Make = Callable[[int], list[Batch]]
"""From the samples done to the microbatches of the step that follows them."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How batches are made ahead."""

    num_workers: int
    """Processes; 0 is one thread of this process, enough where the model computes on CPU."""
    pins_memory: bool
    """Whether batches are laid into page-locked memory, for a GPU."""
    timeout_seconds: float


class StepLoader:
    """The microbatches of the steps of a run, one step after another.

    What a step gets depends on its number alone: neither the workers nor what was taken before changes it.
    """

    def __init__(self, make: Make, *, global_batch: int, end: int, loading: Loading):
        """``end`` is the number of samples of the whole run: nothing is made ahead beyond it."""
        self._make, self._global_batch, self._end, self._loading = make, global_batch, end, loading
        self._next: int | None = None
        self._steps: Iterator[list[Batch]] = iter(())

    def take(self, samples_done: int) -> list[Batch]:
        """Microbatches of the step that follows ``samples_done`` samples.

        DataError when a process that makes them has died, or when they do not come in time.
        """
        if samples_done != self._next or samples_done >= self._end:
            end = max(self._end, samples_done + self._global_batch)
            self._steps = _ahead(self._make, range(samples_done, end, self._global_batch), self._loading)
        self._next = samples_done + self._global_batch
        return next(self._steps)


def _ahead(make: Make, numbers: range, loading: Loading) -> Iterator[list[Batch]]:
    return (_in_processes if loading.num_workers else _in_thread)(make, numbers, loading)


def _in_thread(make: Make, numbers: range, loading: Loading) -> Iterator[list[Batch]]:
    def made(number: int) -> list[Batch]:
        batches = make(number)
        return [batch.pin_memory() for batch in batches] if loading.pins_memory else batches

    pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
    waiting: deque[Future[list[Batch]]] = deque()
    try:
        for number in numbers:
            waiting.append(pool.submit(made, number))
            if len(waiting) > _STEPS_AHEAD:
                yield _result(waiting.popleft(), loading)
        while waiting:
            yield _result(waiting.popleft(), loading)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _result(made: Future[list[Batch]], loading: Loading) -> list[Batch]:
    try:
        return made.result(loading.timeout_seconds)
    except TimeoutError as error:
        raise DataError(_too_slow(loading)) from error


class _Steps(Dataset[list[Batch]]):
    """The steps of a run for torch's loader."""

    def __init__(self, make: Make, numbers: range):
        self._make, self._numbers = make, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, step: int) -> list[Batch]:
        return self._make(self._numbers[step])


def _in_processes(make: Make, numbers: range, loading: Loading) -> Iterator[list[Batch]]:
    loader = DataLoader(
        _Steps(make, numbers),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=loading.num_workers,
        prefetch_factor=_STEPS_AHEAD,
        pin_memory=loading.pins_memory,
        timeout=loading.timeout_seconds,
        multiprocessing_context="spawn",  # the threads of gloo, NCCL and OpenMP do not survive a fork
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "timed out" in str(error):
            raise DataError(_too_slow(loading)) from error
        raise DataError(
            f"a process that makes batches has ended ({error}); if memory is short, lower run.data_workers "
            f"({loading.num_workers}), or set it to 0"
        ) from error


def _as_it_is(batches: list[Batch]) -> list[Batch]:
    return batches


def _too_slow(loading: Loading) -> str:
    return (
        f"no batch came within run.timeout_seconds ({loading.timeout_seconds:g}); look at the file system of "
        "data.corpus, or raise run.timeout_seconds"
    )
