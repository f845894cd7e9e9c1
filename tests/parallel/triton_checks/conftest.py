import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU; tensors of the interpreter are on the CPU."""
    import triton

    return torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")
