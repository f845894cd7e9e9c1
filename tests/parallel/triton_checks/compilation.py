"""Every kernel, called as in training, through Triton's compiler and NVIDIA's assembler, which need no GPU.

The driver is a stand-in that takes what was compiled and does not run it: types, constants and shared memory are
those of a real launch, results are not.
"""

from types import SimpleNamespace

import pytest
import torch

from megatron_bert_tp.parallel.random_bits import Place, RandomBits
from megatron_bert_tp.parallel.triton_attention import PairBits, attend
from megatron_bert_tp.parallel.triton_dropout import TokenBits, bias_dropout_add

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}  # bytes of a program, by capability: A100, H100
BITS = RandomBits(7, (1, 2))


class Driver:
    """What Triton asks of a GPU."""

    def __init__(self):
        self.capability, self.kernels = 80, []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_MEMORY[device]},
            load_binary=lambda *_: (None, None, 0, 0, 1024),
        )

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # kernels are kept by device

    def get_current_stream(self, _device):
        return 0

    def launcher_cls(self, source, _metadata):
        self.kernels.append(source.name)
        return lambda *_: None


@pytest.fixture(scope="module")
def driver():
    import triton

    driver = Driver()
    triton.runtime.driver.set_active(driver)
    return driver


@pytest.fixture(params=SHARED_MEMORY)
def launched(driver, request):
    """Names of the kernels that the test compiles."""
    driver.capability, driver.kernels = request.param, []
    return driver.kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [1024, 1000])
def test_dropout_compiles(launched, dtype, features):
    product = torch.zeros(2 * 3, features, dtype=dtype, requires_grad=True)
    bias = torch.zeros(features, requires_grad=True)
    residual = torch.zeros(2 * 3, features, requires_grad=True)
    tokens = TokenBits.of(BITS, 3, product.device)
    output = bias_dropout_add(
        product, bias, residual, tokens, probability=0.1, layer=1, place=Place.MLP_OUTPUT
    )
    output.sum().backward()
    assert launched == ["forward_kernel", "backward_kernel"]


@pytest.mark.parametrize(
    ("dtype", "heads", "sequence", "head_size", "mask"),
    [
        (torch.bfloat16, 4, 512, 64, "keys"),
        (torch.float32, 1, 1, 16, "keys"),
        (torch.float16, 3, 100, 128, "lengths"),
    ],
)
def test_attention_compiles(launched, dtype, heads, sequence, head_size, mask):
    packed = torch.zeros(3, 2, heads, sequence, head_size, dtype=dtype, requires_grad=True)
    bits = PairBits.of(BITS, 1, heads=range(heads), max_positions=512, device=packed.device)
    lengths = torch.ones(2, dtype=torch.int64) if mask == "lengths" else None
    added = torch.zeros(2, 1, 1, sequence) if mask == "keys" else None
    attend(packed, added, bits, probability=0.1, lengths=lengths).sum().backward()
    assert launched == ["forward_kernel", "queries_kernel", "keys_kernel"]


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_attention_compiles_at_a_precision_of_float32(driver, precision):
    driver.capability, driver.kernels = 90, []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    packed = torch.zeros(3, 1, 2, 200, 64, requires_grad=True)
    attend(packed, None, None, probability=0.0).sum().backward()
    torch.set_float32_matmul_precision(before)
    assert driver.kernels == ["forward_kernel", "queries_kernel", "keys_kernel"]


def test_one_block_of_the_generator_serves_16_elements(driver):
    """64-bit high products in the kernel of a tile: as many for each element where rows begin inside a block."""
    from megatron_bert_tp.parallel.kernels import load_kernels

    driver.capability = 90
    found = []
    for is_aligned in (True, False):
        kernel = load_kernels("bits").lanes_kernel[(1, 1)](
            torch.zeros(16, dtype=torch.int16), torch.ones(1, dtype=torch.int64), 7, 3, 0, 16,
            num_columns=2048, is_aligned=is_aligned, enable_fp_fusion=False,
        )  # fmt: skip
        found.append(kernel.asm["ptx"].count("mul.hi.u64"))
    assert found[1] > 14 * found[0] > 0
