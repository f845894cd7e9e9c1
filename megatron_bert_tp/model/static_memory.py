"""Bytes of weights, gradients and optimizer on one rank, from sizes alone; derived in docs/memory.md.

Nothing here imports torch.
"""

import math
from collections.abc import Iterator, Mapping

from megatron_bert_tp.model.memory import padded_share
from megatron_bert_tp.model.shape import ModelShape, tensor_shapes
from megatron_bert_tp.pipeline.partition import StagePlan

Tensors = Mapping[str, tuple[int, ...]]
"""Names and local shapes of what a rank trains; a tied copy beside its original is left out."""

WORDS, PROJECTION = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
_FLOAT32 = 4
_LAYERS = "bert.encoder.layer."
# By dim, the ends of the names of what the tensor axis splits: twin of the SHARDINGS of the layers.
_SPLIT = {
    0: (
        *(f"self.{block}.{key}" for block in ("query", "key", "value") for key in ("weight", "bias")),
        "intermediate.dense.weight",
        "intermediate.dense.bias",
    ),
    1: ("output.dense.weight",),
}
_OF_VOCABULARY = (WORDS, PROJECTION, "cls.predictions.bias")


def stage_tensors(shape: ModelShape, plan: StagePlan, *, tensor: int = 1) -> Tensors:
    """What one stage trains on the first tensor rank, which holds most."""
    return dict(_held(shape, plan, tensor))


def parameter_bytes(tensors: Tensors, *, element_bytes: int) -> int:
    """The weights themselves."""
    return element_bytes * sum(map(math.prod, tensors.values()))


def gradient_bytes(tensors: Tensors, *, element_bytes: int, owners: int = 1, is_tied_here: bool = False) -> int:
    """Buckets in which gradients add up; with more than one owner the own rows once more, summed over all.

    ``is_tied_here`` says that both uses of the word embeddings are on this rank: each has a sum of its own.
    """
    own = sum(own_elements(shape, owners) for shape in tensors.values())
    apart = own_elements(tensors[WORDS], owners) if is_tied_here else 0
    return max(_FLOAT32, element_bytes) * (owners * (own + apart) + (owners > 1) * own)


def optimizer_bytes(
    tensors: Tensors, *, element_bytes: int, owners: int = 1, owner: int = 0, moments: int = 2
) -> int:
    """Moments, float32 masters of narrow weights, and one counter for each tensor, of one of the owners."""
    own = [own_elements(shape, owners, owner) for shape in tensors.values()]
    copies = moments + (element_bytes < _FLOAT32)
    return max(_FLOAT32, element_bytes) * copies * sum(own) + _FLOAT32 * sum(count > 0 for count in own)


def own_elements(shape: tuple[int, ...], owners: int, owner: int = 0) -> int:
    """Elements in the rows of one owner: even shares but for the last owners, which may have fewer or none."""
    rows, *others = shape
    share = -(-rows // owners)
    return max(0, min(share, rows - owner * share)) * math.prod(others)


def _held(shape: ModelShape, plan: StagePlan, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, whole in tensor_shapes(shape).items():
        if _is_on(name, plan) and not (shape.is_relative and "position_embeddings" in name):
            yield name, _local(name, whole, size)
    if plan.is_last and shape.tie_word_embeddings and not plan.is_first:
        yield PROJECTION, _local(PROJECTION, (shape.vocab_size, shape.hidden_size), size)


def _is_on(name: str, plan: StagePlan) -> bool:
    if name.startswith(_LAYERS):
        return int(name.removeprefix(_LAYERS).partition(".")[0]) in plan.layers
    return plan.is_first if name.startswith("bert.embeddings.") else plan.is_last


def _local(name: str, whole: tuple[int, ...], size: int) -> tuple[int, ...]:
    if name in _OF_VOCABULARY:
        return padded_share(whole[0], size), *whole[1:]
    split = next((dim for dim, ends in _SPLIT.items() if name.startswith(_LAYERS) and name.endswith(ends)), None)
    return tuple(count // size if dim == split else count for dim, count in enumerate(whole))
