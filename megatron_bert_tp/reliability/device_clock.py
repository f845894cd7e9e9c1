"""Seconds by kind on a GPU, where the host's times are those of launching alone."""

from collections import deque
from collections.abc import Callable

import torch

from megatron_bert_tp.reliability.actions import Kind

_MOST_PENDING = 512  # events that wait to be read, before it is tried


class DeviceClock:
    """An event in the device's queue for each action, read when the device has passed it: nobody waits for it.

    What the device does for an action belongs to it, and so does the time in which the device has nothing to do.
    Collectives run on the device too: the wait for tensor peers is part of forward and backward.
    """

    def __init__(self, new_event: Callable[[], torch.cuda.Event] | None = None) -> None:
        self._new_event = _timing_event if new_event is None else new_event
        self._pending: deque[tuple[Kind, torch.cuda.Event]] = deque()
        self._free: list[torch.cuda.Event] = []
        self._seconds = [0.0] * len(Kind)

    def enter(self, kind: Kind) -> None:
        """From here on, the device's time belongs to ``kind``."""
        event = self._free.pop() if self._free else self._new_event()
        event.record()
        self._pending.append((kind, event))
        if len(self._pending) > _MOST_PENDING:
            self._read()

    def take(self) -> dict[Kind, float]:
        """Seconds by kind of all that the device has done since the last call."""
        self._read()
        taken = {kind: seconds for kind, seconds in zip(Kind, self._seconds, strict=True) if seconds}
        self._seconds = [0.0] * len(Kind)
        return taken

    def _read(self) -> None:
        while len(self._pending) > 1 and self._pending[1][1].query():
            kind, begun = self._pending.popleft()
            self._seconds[kind] += begun.elapsed_time(self._pending[0][1]) / 1000
            self._free.append(begun)


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
