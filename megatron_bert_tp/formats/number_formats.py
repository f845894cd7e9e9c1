"""Changing the number format of weights on their way, without turning a large number into an infinite one."""

import torch
from torch import Tensor

from megatron_bert_tp.checkpoint.read import Reader
from megatron_bert_tp.errors import FormatError


def converting(read: Reader, dtype: torch.dtype | None) -> Reader:
    """Source that gives what ``read`` gives in the format ``dtype``; None leaves every tensor as it is.

    FormatError when a number does not fit.
    """

    def converted(name: str, offsets: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        tensor = read(name, offsets, extent)
        if dtype is None or tensor.dtype == dtype:
            return tensor
        result = tensor.to(dtype)
        if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
            _check_finite(name, tensor, result)
        return result

    return converted


def dtype_of(read: Reader, name: str, shape: tuple[int, ...]) -> torch.dtype:
    """Number format of a tensor, found out from one number of it."""
    return read(name, (0,) * len(shape), (1,) * len(shape)).dtype


def _check_finite(name: str, tensor: Tensor, result: Tensor) -> None:
    if torch.equal(result.isinf(), tensor.isinf()):
        return
    name_of_format, largest = str(result.dtype).removeprefix("torch."), torch.finfo(result.dtype).max
    raise FormatError(
        f"{name}: has numbers up to {tensor.abs().max().item():.3g}, but {name_of_format} "
        f"ends at {largest:.3g}; choose bfloat16 or float32"
    )
