"""The two pretraining heads on the last stage: masked language model and next sentence."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bert_tp.model.shape import ModelShape
from megatron_bert_tp.parallel.linear import VocabParallelProjection
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.sharding import Sharding, padded_share


class Pooler(nn.Module):
    """``tanh(dense(h_0))``: a summary of the sequence from its first position."""

    def __init__(self, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[batch, sequence, hidden]`` to ``[batch, hidden]``."""
        return torch.tanh(self.dense(hidden[:, 0]))


class PredictionTransform(nn.Module):
    """Dense, GELU, LayerNorm before the projection on the vocabulary; replicated over the tensor axis."""

    def __init__(self, hidden_size: int, layer_norm_eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size, dtype=dtype)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., hidden]`` to the same shape."""
        normed: Tensor = self.LayerNorm(F.gelu(self.dense(hidden)))
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
        self.transform = PredictionTransform(shape.hidden_size, shape.layer_norm_eps, dtype=dtype)
        self.decoder = VocabParallelProjection(shape.hidden_size, shape.vocab_size, axis=axis, dtype=dtype)

    def forward(self, rows: Tensor) -> Tensor:
        """``[masked, hidden]`` to this rank's logits ``[masked, share]``."""
        logits: Tensor = self.decoder(self.transform(rows), self.bias)
        return logits


class PretrainingHeads(nn.Module):
    """Both heads under Hugging Face's prefix ``cls``."""

    def __init__(self, shape: ModelShape, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        self.predictions = MaskedLanguageModelHead(shape, axis=axis, dtype=dtype)
        self.seq_relationship = nn.Linear(shape.hidden_size, 2, dtype=dtype)
