"""From a checkpoint, or any other source of weights, into the parameters and moments that a rank holds."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megatron_bert_tp.checkpoint.read import Checkpoint, Reader
from megatron_bert_tp.errors import CheckpointError
from megatron_bert_tp.parallel.sharding import Part


def load_parts_(parts: Iterable[Part], read: Reader) -> None:
    """Fill the parameters behind ``parts``; padding keeps its values, number formats are converted."""
    _fill_(parts, lambda part: part.parameter, read)


def load_rectangles_(
    parts: Iterable[Part], kind: str, tensor_of: Callable[[Part], Tensor | None], checkpoint: Checkpoint
) -> None:
    """Fill, for every part, the tensor of the parameter's shape that ``tensor_of`` gives (a moment).

    Parts of which it gives None are left out; a tied copy gets the values of its original.
    CheckpointError when the checkpoint holds no tensors of that kind.
    """
    if not checkpoint.shapes(kind):
        raise CheckpointError(
            f"{checkpoint.directory}: holds no {kind}, so it has no optimizer state; start a new run from its "
            "weights with model.weights="
        )

    def read(name: str, offsets: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        return checkpoint.read(f"{kind}/{name}", offsets, extent)

    _fill_(parts, tensor_of, read)


def _fill_(parts: Iterable[Part], tensor_of: Callable[[Part], Tensor | None], read: Reader) -> None:
    with torch.no_grad():
        for part in parts:
            target = tensor_of(part)
            if target is not None and 0 not in part.local_shape:
                part.view(target).copy_(read(part.source, part.offsets, part.local_shape))
