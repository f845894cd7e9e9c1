"""`exit.json`: how a run ended, written by whoever ended it first.

torchrun turns every exit code of a rank into 1, and ranks that lose a peer fail too.  The file keeps the first
cause: it is made once, by linking, which works once on one host and on many.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_bert_tp.errors import ExitCode

NAME = "exit.json"
_LONGEST, _LONGEST_CAUSE = 1 << 16, 10_000


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: code, cause for people, and where it goes on.

    ``rank`` is the one that failed, ``step`` the number of steps done; None where it is not known.
    """

    code: ExitCode
    cause: str
    rank: int | None = None
    step: int | None = None
    checkpoint: str | None = None
    next: str = ""

    def line(self) -> str:
        """All of it but the cause, in one line of ``key=value``."""
        known = {"code": int(self.code), "rank": self.rank, "step": self.step, "checkpoint": self.checkpoint}
        values = " ".join(f"{key}={'none' if value is None else value}" for key, value in known.items())
        return f"ended: {self.code.name.lower().replace('_', ' ')}; {values}; next: {self.next or 'start again'}"


class OutcomeFile:
    """The file ``exit.json`` in the folder of a run."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME

    def clear(self) -> None:
        """Forget how the run before ended; the first rank does it while it holds the lock of the folder."""
        self.path.unlink(missing_ok=True)

    def claim(self, outcome: Outcome) -> bool:
        """Write ``outcome`` unless there is one already; whether this process is the first.

        Where nothing can be written, every process is the first: better told twice than not at all.
        """
        own = self.path.with_name(f".{NAME}.{secrets.token_hex(8)}")
        try:
            own.write_text(_text(outcome), encoding="utf-8")
            self._place(own)
        except FileExistsError:
            return False
        except OSError:
            return True
        finally:
            with suppress(OSError):
                own.unlink(missing_ok=True)
        return True

    def _place(self, own: Path) -> None:
        """Give a file the name that only one can have; FileExistsError where another one has it."""
        try:
            os.link(own, self.path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links: here a kill could leave half of it
            with self.path.open("x", encoding="utf-8") as file:
                file.write(own.read_text(encoding="utf-8"))

    def read(self) -> Outcome | None:
        """How the run ended; None while it has not."""
        try:
            with self.path.open(encoding="utf-8") as file:
                return _outcome(json.loads(file.read(_LONGEST)))
        except (OSError, ValueError, RecursionError):
            return None


def _text(outcome: Outcome) -> str:
    cause = outcome.cause if len(outcome.cause) <= _LONGEST_CAUSE else f"{outcome.cause[:_LONGEST_CAUSE]} ..."
    body = {**asdict(outcome), "cause": cause, "code": int(outcome.code), "outcome": outcome.code.name.lower()}
    return json.dumps({**body, "host": socket.gethostname(), "time": time.time()}, indent=1) + "\n"


def _outcome(values: object) -> Outcome:
    """ValueError when ``values`` are no outcome."""
    if not isinstance(values, Mapping):
        raise ValueError("no object")
    numbers = [values.get(key) for key in ("code", "rank", "step")]
    code, rank, step = (number if isinstance(number, int) else None for number in numbers)
    if code is None:
        raise ValueError("no code")
    checkpoint = values.get("checkpoint")
    return Outcome(
        code=ExitCode(code),
        cause=str(values.get("cause", "")),
        rank=rank,
        step=step,
        checkpoint=checkpoint if isinstance(checkpoint, str) else None,
        next=str(values.get("next", "")),
    )
