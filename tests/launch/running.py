"""The scripts of launch/ as processes, with a stand-in for the entry point where a test says so."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.sources import ROOT

STAND_IN = Path(__file__).parent / "stand_in.py"
# An interpreter that runs the stand-in wherever it is asked to run the entry point.
WRAPPER = f"""#!/usr/bin/env bash
given=("$@")
for place in "${{!given[@]}}"; do
  if [[ ${{given[place]}} == megatron_bert_tp.pretrain ]]; then
    given[place]={STAND_IN}
    unset "given[place-1]"
  fi
done
exec {sys.executable} "${{given[@]}}"
"""


def interpreter(folder: Path) -> Path:
    """The wrapper, made in ``folder``."""
    path = folder / "python-with-stand-in"
    path.write_text(WRAPPER)
    path.chmod(0o755)
    return path


def environment(python: object, **variables: str) -> dict[str, str]:
    fixed = {"PYTHON": str(python), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NPROC": "2"}
    return {**os.environ, **fixed, **variables}


def end_family(process: int) -> None:
    """Kill a process that nobody has collected yet, and all that it has started."""
    for each in _family(process):
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def _family(process: int) -> list[int]:
    found = [process]
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            found += [each for child in children.read_text().split() for each in _family(int(child))]
    return found


class Started(subprocess.Popen[str]):
    """``with`` it: a test that fails leaves no process behind, and waits for none."""

    def __exit__(self, *raised: object) -> None:
        if self.poll() is None:
            end_family(self.pid)
        super().__exit__(*raised)


def start(script: str, *arguments: object, **variables: str) -> Started:
    """One of launch/ with its output in pipes; ``PYTHON`` among the variables is the interpreter."""
    command = [str(ROOT / "launch" / script), *map(str, arguments)]
    return Started(
        command,
        env=environment(variables.pop("PYTHON", sys.executable), **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.02)


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
