"""Runs a file of checks in a process of its own: a kernel becomes one of the interpreter when it is defined."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from tests.sources import ROOT

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed; pip install triton (1 GB)")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def check(file: str, cache: os.PathLike[str], *, is_interpreted: bool) -> None:
    """Run one file of checks; its report is the message of a failure."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if is_interpreted else {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"tests/parallel/triton_checks/{file}.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
