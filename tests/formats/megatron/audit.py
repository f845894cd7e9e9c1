"""Python processes that write down what they do, their children too."""

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.sources import ROOT

CANARY = "canary_of_the_tests"
# `sitecustomize` is imported at the start of every Python process that sees its folder in PYTHONPATH.
_HOOK = f"""
import os, sys

log = os.open({{log!r}}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
CHANGING = {{{{
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.startfile", "subprocess.Popen",
    "os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "socket.connect", "pickle.find_class",
}}}}

def hook(event, arguments):
    if event == "open":
        seen, _mode, flags = arguments
        if not (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
    elif event in ("compile", "exec"):
        code = arguments[0]
        if not getattr(code, "co_filename", "<").startswith("<"):
            return  # a module
        seen = getattr(code, "co_consts", code)
        if {CANARY!r} not in repr(seen):
            return
    elif event in CHANGING:
        seen = arguments
    else:
        return
    os.write(log, (repr((event, repr(seen), os.getpid())) + "\\n").encode())

sys.addaudithook(hook)
"""


@dataclass(frozen=True)
class Event:
    name: str
    what: str
    process: int


def audited(folder: Path, code: str, *arguments: str) -> tuple[str, list[Event]]:
    """Output of a Python program, and the events of it and of every Python process that it started."""
    folder.mkdir()
    log = folder / "log"
    (folder / "sitecustomize.py").write_text(_HOOK.format(log=str(log)))
    environment = {
        "PYTHONPATH": f"{folder}:{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
    }
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    return done.stdout, [Event(*ast.literal_eval(line)) for line in lines]
