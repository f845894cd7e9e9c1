"""What every microbatch can do: go to a device, be pinned, and come from a worker process."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Tensors:
    """Base of a frozen dataclass whose fields are tensors and plain values."""

    def to(self, device: torch.device) -> Self:
        """The same with all tensors on ``device``; asynchronously where they are pinned."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The same in page-locked memory, from which a GPU copies while it computes."""
        return self._with_tensors(Tensor.pin_memory)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, as from a worker process, tensors are arrays: torch would send each as an open file."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays = {name: v.numpy() if isinstance(v, Tensor) else v for name, v in values.items()}
        return _from_arrays, (type(self), arrays)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in tensors.items()}
        return replace(self, **changed)


def _from_arrays(kind: type[Tensors], values: dict[str, Any]) -> Tensors:
    """The microbatch with these fields, its tensors given as arrays."""
    return kind(**{name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in values.items()})
