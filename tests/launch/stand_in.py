"""Stands in for `megatron_bert_tp.pretrain` in tests of the scripts in launch/: a rank that obeys.

STAND_IN says what it does: ``finish``; ``crash`` before it clears the outcome of another run; ``vanish``, which
ends with 0 and tells nothing; ``fail``; ``restart``, which fails, but finishes when it is started again; ``obey``,
which works until a signal and saves for a second; ``save``, which does so until there is ``go`` in the run's
folder; ``deaf``, which works on.
"""

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from megatron_bert_tp.config.load import load_any
from megatron_bert_tp.errors import ExitCode
from megatron_bert_tp.reliability.outcome import Outcome, OutcomeFile

SAVING_SECONDS = 1.0
LONGEST_SECONDS = 120.0  # a test that fails may never let it go
RANK = os.environ.get("RANK", "0")


class Rank:
    """What one rank does, with all signals that it gets in ``signals.RANK`` of the run's folder."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.outcome = directory, OutcomeFile(directory)
        self.signals: list[str] = []

    def hear(self, number: int, _frame: FrameType | None) -> None:
        self.signals.append(signal.Signals(number).name)
        (self.directory / f"signals.{RANK}").write_text(" ".join(self.signals))
        if self.signals.count("SIGINT") == 2:
            self.end(ExitCode.INTERRUPTED)

    def end(self, code: ExitCode) -> None:
        self.outcome.claim(Outcome(code=code, cause="stand-in"))
        os._exit(code)

    def work(self, task: str) -> None:
        (self.directory / f"ready.{RANK}").write_text(str(os.getpid()))
        while task == "deaf" or not self.signals:
            time.sleep(0.02)
        saved = time.monotonic() + (LONGEST_SECONDS if task == "save" else SAVING_SECONDS)
        while time.monotonic() < saved and not (self.directory / "go").exists():
            time.sleep(0.02)
        self.end(ExitCode.STOPPED)


def main(arguments: list[str]) -> None:
    rank = Rank(Path(load_any(Path(arguments[0]), arguments[1:], world_size=None).run.directory))
    task = os.environ["STAND_IN"]
    if task == "crash":
        raise SystemExit(7)
    if RANK == "0":
        rank.outcome.clear()
    if task in ("obey", "save", "deaf"):
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(each, rank.hear)
        rank.work(task)
    if task == "vanish":
        return
    is_first_time = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    fails = task == "fail" or (task == "restart" and is_first_time)
    rank.end(ExitCode.HANG if fails else ExitCode.FINISHED)


if __name__ == "__main__":
    main(sys.argv[1:])
