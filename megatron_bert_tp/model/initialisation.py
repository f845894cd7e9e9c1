"""Initial weights as a function of (seed, tensor name): the same whatever rank they lie on."""

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from megatron_bert_tp.model.shape import ModelShape
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.parallel.sharding import Part


def initial_tensor(name: str, shape: tuple[int, ...], *, seed: int, deviation: float) -> Tensor:
    """Whole initial tensor, float32: normal weights, LayerNorms at one, biases at zero.

    MegatronBert as Hugging Face initialises it: ``normal(0, initializer_range)`` everywhere, no scaling by
    depth.  The generator is Philox keyed by the SHA-256 of seed and name.
    """
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if name.endswith((".ln.weight", ".LayerNorm.weight")):
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).mul_(deviation)


def initialise_(stage: MegatronBertStage, *, seed: int) -> None:
    """Fill every parameter of ``stage``; the row of [PAD] in the word embeddings is zero."""
    initialise_parts_(((part, part.view(part.parameter)) for part in stage.parts()), stage.shape, seed=seed)


def initialise_parts_(held: Iterable[tuple[Part, Tensor]], shape: ModelShape, *, seed: int) -> None:
    """Fill tensors, each of the local shape of its part."""
    with torch.no_grad():
        for part, target in held:
            whole = initial_tensor(part.source, part.shape, seed=seed, deviation=shape.initializer_range)
            if part.source == "bert.embeddings.word_embeddings.weight":
                whole[shape.pad_token_id] = 0
            target.copy_(part.cut(whole))
