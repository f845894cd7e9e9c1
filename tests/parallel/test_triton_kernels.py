"""The Triton kernels: in Triton's interpreter where there is no GPU, and on one where there is.

The checks are ordinary tests in `triton_checks`, in a process of their own: a kernel becomes one of the
interpreter when it is defined, by a variable of the environment.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

from megatron_bert_tp.parallel.kernels import load_kernels
from tests.sources import ROOT

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed; pip install triton (1 GB)")

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from megatron_bert_tp.parallel.triton_attention import attend
from megatron_bert_tp.parallel.triton_dropout import TokenBits, bias_dropout_add
attend(torch.zeros(3, 1, 1, 4, 16), None, None, probability=0.0)
"""


def check(file: str, cache: os.PathLike[str], *, is_interpreted: bool) -> None:
    """Run one file of checks; its report is the message of a failure."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if is_interpreted else {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"tests/parallel/triton_checks/{file}.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@needs_triton
@pytest.mark.parametrize("file", ["bits", "dropout", "attention"])
def test_kernels_in_the_interpreter(file, tmp_path):
    check(file, tmp_path, is_interpreted=True)


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="the assembler comes with triton for Linux")
def test_kernels_compile_for_gpus(tmp_path):
    check("compilation", tmp_path, is_interpreted=False)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("file", ["bits", "dropout", "attention"])
def test_kernels_on_a_gpu(file, tmp_path):
    check(file, tmp_path, is_interpreted=False)


def test_importing_needs_no_triton_and_using_says_so():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert "ConfigError: dropout on a GPU runs as Triton kernels, and the package" in last


def test_another_missing_module_is_not_taken_for_triton():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        load_kernels("no_such_module")
