"""The Triton kernels: in Triton's interpreter where there is no GPU, and on one where there is.

The checks are ordinary tests in `triton_checks`, in a process of their own.
"""

import subprocess
import sys

import pytest
import torch

from megatron_bert_tp.parallel import triton_dropout
from megatron_bert_tp.parallel.kernels import load_kernels
from megatron_bert_tp.parallel.triton_dropout import kernels_for
from tests.parallel.triton_checks.processes import check, needs_gpu, needs_triton
from tests.sources import ROOT

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from megatron_bert_tp.parallel.triton_attention import attend
from megatron_bert_tp.parallel.triton_dropout import TokenBits, bias_dropout_add
attend(torch.zeros(3, 1, 1, 4, 16), None, None, probability=0.0)
"""


@needs_triton
@pytest.mark.parametrize("file", ["bits", "dropout", "attention"])
def test_kernels_in_the_interpreter(file, tmp_path):
    check(file, tmp_path, is_interpreted=True)


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the assembler comes with triton for Linux")
def test_kernels_compile_for_gpus(tmp_path):
    check("compilation", tmp_path, is_interpreted=False)


@pytest.mark.gpu
@needs_gpu
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


@pytest.mark.parametrize(
    ("device", "dtype", "has_triton", "expected"),
    [
        ("cuda", torch.float32, True, "triton"),
        ("cuda", torch.bfloat16, True, "triton"),
        ("cuda", torch.float16, True, "triton"),
        ("cuda", torch.float64, True, "torch"),
        ("cuda", torch.float32, False, "torch"),
        ("cpu", torch.float32, True, "torch"),
    ],
)
def test_kernels_are_for_cuda_with_triton_and_their_number_formats(
    monkeypatch, device, dtype, has_triton, expected
):
    monkeypatch.setattr(triton_dropout, "find_spec", lambda _: object() if has_triton else None)
    assert kernels_for(torch.device(device), dtype) == expected
