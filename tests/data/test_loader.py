"""Batches made in the background: the same whoever makes them, and never a silent wait."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.data.loader import Loading, StepLoader
from megatron_bert_tp.data.packing import Cutting
from megatron_bert_tp.errors import DataError
from tests.data.corpora import Even, make_batches, numbered_documents, numbered_vocabulary, random_shape

STUCK = """
import time
from megatron_bert_tp.data.loader import Loading, StepLoader

loading = Loading(num_workers=0, pins_memory=False, timeout_seconds=0.5)
loader = StepLoader(lambda number: time.sleep(600), size_of=lambda done: 1, end=5, loading=loading)
loader.take(0)
"""
THREAD = Loading(num_workers=0, pins_memory=False, timeout_seconds=60)
END = 16 * 8


@contextmanager
def more_workers_than_cores() -> Iterator[None]:
    """Torch advises against it, and here it is the point."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


@pytest.fixture
def batches(write_corpus):
    corpus = write_corpus(numbered_documents(random_shape(60)))
    return make_batches(corpus, numbered_vocabulary(), cutting=Cutting(packing="packed", size=256))


def bytes_of(step: list[Batch]) -> list[tuple]:
    values = [[getattr(batch, field.name) for field in fields(batch)] for batch in step]
    return [tuple(v.numpy().tobytes() if isinstance(v, torch.Tensor) else v for v in batch) for batch in values]


class Slow:
    """Batches that come late, from a process whose number is written down."""

    def __init__(self, seconds: float, note: str, kind: type[Exception] = DataError):
        self._seconds, self._note, self._kind = seconds, note, kind

    def __call__(self, number: int) -> list[Batch]:
        with open(self._note, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(self._seconds)
        raise self._kind(f"sample {number} cannot be read")


@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
def test_every_number_of_workers_gives_the_same_bytes(batches, num_workers):
    loader = StepLoader(
        batches.take, size_of=Even(16), end=END, loading=replace(THREAD, num_workers=num_workers)
    )
    with more_workers_than_cores():
        for step in range(8):
            assert bytes_of(loader.take(16 * step)) == bytes_of(batches.take(16 * step))


def test_a_run_may_begin_anywhere_and_go_beyond_its_end(batches):
    loader = StepLoader(batches.take, size_of=Even(16), end=END, loading=THREAD)
    for first in (80, 96, 0, 16, 112, 128, 144, 16):
        assert bytes_of(loader.take(first)) == bytes_of(batches.take(first))


def test_batches_are_made_ahead_but_not_beyond_the_end():
    made: list[int] = []

    def make(number: int) -> list[Batch]:
        made.append(number)
        return []

    loader = StepLoader(make, size_of=Even(10), end=50, loading=THREAD)
    loader.take(0)
    deadline = time.monotonic() + 30
    while made != [0, 10, 20] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [0, 10, 20]
    for number in (10, 20, 30, 40):
        loader.take(number)
    assert made == [0, 10, 20, 30, 40]


@pytest.mark.parametrize("kind", [DataError, RuntimeError])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_goes_wrong_while_a_batch_is_made_is_told_by_the_step_that_needs_it(tmp_path, num_workers, kind):
    loading = replace(THREAD, num_workers=num_workers)
    loader = StepLoader(Slow(0, str(tmp_path / "note"), kind), size_of=Even(1), end=5, loading=loading)
    with pytest.raises(kind, match="sample 3 cannot be read") as raised:
        loader.take(3)
    assert kind is not DataError or str(raised.value) == "sample 3 cannot be read"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_that_does_not_come_is_waited_for_no_longer_than_the_timeout(tmp_path, num_workers):
    loading = replace(THREAD, num_workers=num_workers, timeout_seconds=0.5)
    loader = StepLoader(Slow(3, str(tmp_path / "note")), size_of=Even(1), end=5, loading=loading)
    with pytest.raises(DataError, match=r"no batch came within run.timeout_seconds \(0.5\)"):
        loader.take(0)


def test_a_process_ends_though_its_thread_is_stuck():
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60, check=False)
    assert "no batch came within run.timeout_seconds (0.5)" in done.stderr
    assert done.returncode == 1


def test_batches_of_a_worker_process_hold_no_files_open(write_corpus):
    corpus = write_corpus(numbered_documents(random_shape(60)))
    batches = make_batches(corpus, numbered_vocabulary(), cutting=Cutting(packing="none", size=1))
    loader = StepLoader(batches.take, size_of=Even(16), end=END, loading=replace(THREAD, num_workers=1))
    held = [loader.take(0)]
    before = len(os.listdir("/dev/fd"))
    held += [loader.take(16 * step) for step in range(1, 8)]
    assert sum(map(len, held)) == END
    assert len(os.listdir("/dev/fd")) < before + 16


def test_a_worker_that_is_killed_is_told_with_the_way_out(tmp_path):
    note = tmp_path / "note"
    loader = StepLoader(Slow(60, str(note)), size_of=Even(1), end=5, loading=replace(THREAD, num_workers=1))

    def kill() -> None:
        while not note.exists() or not note.read_text():
            time.sleep(0.05)
        os.kill(int(note.read_text()), signal.SIGKILL)

    threading.Thread(target=kill).start()
    with pytest.raises(DataError, match=r"has ended .* lower run.data_workers \(1\)"):
        loader.take(0)


def test_numbers_reach_worker_processes_as_they_are(batches):
    loader = StepLoader(batches.take, size_of=Even(16), end=2**40 + 64, loading=replace(THREAD, num_workers=1))
    (first, *_) = loader.take(2**40)
    assert min(first.sample_numbers) >= 2**40
    assert np.all(np.array(first.sample_numbers) < 2**40 + 16)


def test_steps_may_grow_at_first():
    """Sizes 10, 20, 30 and then 40: every step begins where the one before ended."""
    seen = []

    def make(number: int) -> list[Batch]:
        seen.append(number)
        return []

    loader = StepLoader(make, size_of=lambda done: min(40, 10 + done // 3), end=180, loading=THREAD)
    done = 0
    starts = []
    while done < 180:
        starts.append(done)
        loader.take(done)
        done += min(40, 10 + done // 3)
    assert seen == starts
    assert starts[:4] == [0, 10, 23, 40]
