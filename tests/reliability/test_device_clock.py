"""Times that a device notes; on a GPU, and with events whose times are set by hand."""

import time

import pytest
import torch

from megatron_bert_tp.reliability.actions import Actions, Kind
from megatron_bert_tp.reliability.board import Board
from megatron_bert_tp.reliability.device_clock import DeviceClock


class Queue:
    """A device that has come to ``now``; the events in its queue pass at times given beforehand."""

    def __init__(self, times):
        self.now, self.made, self._times = 0.0, 0, iter(times)

    def event(self):
        self.made += 1
        return HandSetEvent(self)

    def next_time(self):
        return next(self._times)


class HandSetEvent:
    def __init__(self, queue):
        self._queue, self.time = queue, 0.0

    def record(self):
        self.time = self._queue.next_time()

    def query(self):
        return self.time <= self._queue.now

    def elapsed_time(self, end_event):
        return end_event.time - self.time


def test_time_belongs_to_the_kind_entered_last_once_the_device_has_passed_the_next():
    queue = Queue([10, 30, 70, 80])
    clock = DeviceClock(queue.event)
    for kind in (Kind.FORWARD, Kind.BACKWARD, Kind.FORWARD, Kind.OPTIMIZER):
        clock.enter(kind)
    queue.now = 75  # it has come to the second forward
    assert clock.take() == {Kind.FORWARD: 0.020, Kind.BACKWARD: 0.040}
    queue.now = 80
    assert clock.take() == {Kind.FORWARD: 0.010}
    assert clock.take() == {}


def test_events_are_used_again():
    queue = Queue(range(2000))
    clock = DeviceClock(queue.event)
    for number in range(2000):
        queue.now = number
        clock.enter(Kind.FORWARD)
    assert queue.made < 600
    assert clock.take() == {Kind.FORWARD: pytest.approx(1.999, abs=1e-9)}


@pytest.mark.gpu
def test_the_devices_time_is_told_and_not_the_launching():
    matrix = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    actions = Actions(Board.alone(), DeviceClock())
    started = time.perf_counter()
    actions.enter(Kind.FORWARD)
    for _ in range(20):
        matrix = torch.tanh(matrix @ matrix)
    actions.enter(Kind.OPTIMIZER)
    launched = time.perf_counter() - started
    torch.cuda.synchronize()
    passed = time.perf_counter() - started
    forward = actions.take_seconds()[Kind.FORWARD]
    assert launched < forward <= passed
