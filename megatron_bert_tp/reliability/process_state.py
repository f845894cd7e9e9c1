"""What the operating system says of another process of this host; a number that was given anew is not mistaken."""

import os
import signal
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

_START_TIME = 19  # place of the start time in /proc/PID/stat, counted after the name


class ProcessState(Enum):
    """How a process is, in words for people."""

    RUNNING = "running"
    STOPPED = "stopped"
    IN_KERNEL = "waits in the kernel"
    GONE = "gone"


@dataclass(frozen=True)
class Process:
    """A process of this host: its number, and when it was started (clock ticks; 0 where nobody says)."""

    number: int
    started: int

    @classmethod
    def own(cls) -> "Process":
        """The calling process."""
        return cls(os.getpid(), _started(_fields(os.getpid())))

    @property
    def state(self) -> ProcessState:
        """GONE too for one that is dead and not yet collected, and where the number belongs to another one now."""
        fields = _fields(self.number)
        if not fields:
            return ProcessState.RUNNING if not self.started and _exists(self.number) else ProcessState.GONE
        if _started(fields) != self.started:
            return ProcessState.GONE
        return _LETTERS.get(fields[0], ProcessState.RUNNING)

    def kill(self) -> bool:
        """End it at once, if it is still the same process; whether it was."""
        return self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> bool:
        """Send a signal, if it is still the same process; whether it was."""
        try:
            handle = os.pidfd_open(self.number)
        except (OSError, AttributeError):  # gone, or no Linux
            return False
        try:
            # Between opening the handle and here the number cannot have changed its meaning.
            if self.state is ProcessState.GONE:
                return False
            signal.pidfd_send_signal(handle, number)
        except OSError:
            return False
        finally:
            os.close(handle)
        return True


_LETTERS = {
    "T": ProcessState.STOPPED,
    "t": ProcessState.STOPPED,
    "D": ProcessState.IN_KERNEL,
    "Z": ProcessState.GONE,
    "X": ProcessState.GONE,
}


def _fields(number: int) -> list[str]:
    """What follows the name in /proc/PID/stat; empty for no process, and where there is no /proc."""
    try:
        text = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    # The name is in brackets and may hold anything, brackets too.
    return text.rpartition(")")[2].split()


def _started(fields: list[str]) -> int:
    return int(fields[_START_TIME]) if len(fields) > _START_TIME else 0


def _exists(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
