"""What stands on the encoder on the last stage: language model, next sentence, classifiers."""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bert_tp.model.activations import ACTIVATION_FUNCTIONS
from megatron_bert_tp.model.dropout import dropout_add
from megatron_bert_tp.model.shape import Head, ModelShape
from megatron_bert_tp.parallel.linear import VocabParallelProjection
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.narrow import is_narrow
from megatron_bert_tp.parallel.random_bits import Place, RandomBits
from megatron_bert_tp.parallel.replicated import HeadLayerNorm
from megatron_bert_tp.parallel.sharding import Sharding, padded_share
from megatron_bert_tp.parallel.triton_dropout import TokenBits


class Pooler(nn.Module):
    """``tanh(dense(h_0))``: a summary of the sequence from its first position."""

    def __init__(self, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[batch, sequence, hidden]`` to ``[batch, hidden]``."""
        return torch.tanh(self.dense(hidden[:, 0]))


class PredictionTransform(nn.Module):
    """Dense, activation, LayerNorm before the projection on the vocabulary; replicated over the tensor axis."""

    def __init__(self, shape: ModelShape, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.activation = ACTIVATION_FUNCTIONS[shape.hidden_act]
        self.dense = nn.Linear(shape.hidden_size, shape.hidden_size, dtype=dtype)
        self.LayerNorm = HeadLayerNorm(shape.hidden_size, eps=shape.layer_norm_eps, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., hidden]`` to the same shape."""
        normed: Tensor = self.LayerNorm(self.activation(self.dense(hidden)))
        return normed


class MaskedLanguageModelHead(nn.Module):
    """Logits over the vocabulary for the rows that it is given: the masked positions, and no others.

    A head at every position would be 80% of the FLOPs of a small model, and weigh two layers on the last stage
    of a large one.  ``decoder.weight`` is a leaf of its own also where the embeddings are tied.
    """

    SHARDINGS: ClassVar[dict[str, Sharding]] = {"bias": Sharding(dim=0)}

    def __init__(self, shape: ModelShape, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        self.axis = axis
        self.full_shapes = {"bias": (shape.vocab_size,)}
        self.bias = nn.Parameter(torch.zeros(padded_share(shape.vocab_size, axis), dtype=dtype))
        self.transform = PredictionTransform(shape, dtype=dtype)
        self.decoder = VocabParallelProjection(shape.hidden_size, shape.vocab_size, axis=axis, dtype=dtype)

    def forward(self, rows: Tensor) -> Tensor:
        """``[masked, hidden]`` to this rank's logits ``[masked, share]``."""
        logits: Tensor = self.decoder(self.transform(rows), self.bias)
        return logits


class LanguageHeads(nn.Module):
    """The language model and the next-sentence head under Hugging Face's prefix ``cls``, as ``head`` has them."""

    def __init__(self, shape: ModelShape, head: Head, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        if head.has_predictions:
            self.predictions = MaskedLanguageModelHead(shape, axis=axis, dtype=dtype)
        if head.has_next_sentence:
            self.seq_relationship = nn.Linear(shape.hidden_size, 2, dtype=dtype)


def wide_linear(linear: nn.Module, states: Tensor) -> Tensor:
    """A linear layer of few outputs, computed in float32 where its weights are narrower.

    The logits of bfloat16 have 8 bits: too few to tell neighbouring values of a regression apart.
    """
    assert isinstance(linear, nn.Linear)
    if not is_narrow(states):
        logits: Tensor = linear(states)
        return logits
    return F.linear(states.float(), linear.weight.float(), linear.bias.float())


def classify(
    linear: Callable[[Tensor], Tensor], states: Tensor, bits: RandomBits | TokenBits | None, probability: float
) -> Tensor:
    """Dropout, then the linear layer: ``[batch, hidden]`` or ``[batch, sequence, hidden]`` to logits."""
    rows = states if states.dim() == 3 else states[:, None]
    dropped = dropout_add(rows, None, bits, probability=probability, layer=0, place=Place.CLASSIFIER)
    return linear(dropped if states.dim() == 3 else dropped[:, 0])
