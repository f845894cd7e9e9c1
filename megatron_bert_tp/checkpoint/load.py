"""From a checkpoint, or any other source of weights, into the parameters and moments that a rank holds."""

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_bert_tp.checkpoint.read import Checkpoint, Reader
from megatron_bert_tp.errors import CheckpointError
from megatron_bert_tp.parallel.sharding import Part


def load_parts_(parts: Iterable[Part], read: Reader) -> None:
    """Fill the parameters behind ``parts``; padding keeps its values, number formats are converted."""
    fill_(((part, part.view(part.parameter)) for part in parts), read)


def load_rectangles_(kind: str, held: Iterable[tuple[Part, Tensor]], checkpoint: Checkpoint) -> None:
    """Fill tensors of that kind (a moment), each of the local shape of its part.

    A tied copy gets the values of its original.  CheckpointError when the checkpoint holds none of that kind.
    """
    if not checkpoint.shapes(kind):
        raise CheckpointError(
            f"{checkpoint.directory}: holds no {kind}, so it has no state of this optimizer; start a new run from "
            "its weights with model.weights="
        )

    def read(name: str, offsets: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        return checkpoint.read(f"{kind}/{name}", offsets, extent)

    fill_(held, read)


def fill_(held: Iterable[tuple[Part, Tensor]], read: Reader) -> None:
    """Fill tensors, each of the local shape of its part; a tied copy gets the values of its original."""
    with torch.no_grad():
        for part, target in held:
            if 0 not in part.local_shape:
                target.copy_(read(part.source, part.offsets, part.local_shape))
