"""The word embeddings of a model and its projection on the vocabulary: exchanged, tied and resized."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from megatron_bert_tp.errors import ArgumentError
from megatron_bert_tp.formats.huggingface import BIAS, DECODER_BIAS
from megatron_bert_tp.model.heads import MaskedLanguageModelHead
from megatron_bert_tp.parallel.embedding import VocabParallelEmbedding
from megatron_bert_tp.parallel.linear import VocabParallelProjection
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.sharding import padded_share


def embedding_of(value: nn.Module, axis: Axis) -> nn.Module:
    """A module that can stand for the word embeddings; ArgumentError for a whole one where they are split."""
    if axis.size > 1 and not isinstance(value, VocabParallelEmbedding):
        raise ArgumentError(
            f"the word embeddings are split over {axis.size} tensor ranks, and {type(value).__name__} is whole; "
            "give a VocabParallelEmbedding, or set them before the model is sharded"
        )
    return value


def set_projection_(head: MaskedLanguageModelHead, value: nn.Module, axis: Axis) -> None:
    """Let ``head`` project with the weight, and the bias if there is one, of a linear layer or a projection."""
    if isinstance(value, VocabParallelProjection):
        head.decoder = value
        return
    if axis.size > 1 or not isinstance(value, nn.Linear):
        raise ArgumentError(
            f"{type(value).__name__} cannot be the output embeddings; give a VocabParallelProjection, or at one "
            "tensor rank a torch.nn.Linear"
        )
    rows, features = value.weight.shape
    head.decoder = VocabParallelProjection(features, rows, axis=axis, dtype=value.weight.dtype)
    head.decoder.weight = cast(nn.Parameter, value.weight)
    head.full_shapes = {"bias": (rows,)}
    bias: Tensor | None = value.bias
    if bias is not None:
        head.bias = cast(nn.Parameter, bias)
    elif head.bias.shape[0] != rows:
        head.bias = nn.Parameter(value.weight.new_zeros(rows))


def resized_rows(whole: Tensor, num_rows: int, *, deviation: float | None, generator: torch.Generator) -> Tensor:
    """``whole`` ``[rows, ...]`` with ``num_rows`` rows: cut off, or with new ones at the end.

    New rows are the mean of the old ones, or with a ``deviation`` normal around 0 (biases stay 0).
    """
    if num_rows <= whole.shape[0]:
        return whole[:num_rows].clone()
    shape = (num_rows - whole.shape[0], *whole.shape[1:])
    if deviation is None:
        added = whole.mean(0, keepdim=True).expand(shape)
    else:
        scale = deviation if whole.dim() > 1 else 0.0
        added = torch.randn(shape, generator=generator).to(whole.dtype) * scale
    return torch.cat([whole, added])


def make_rows_(
    embedding_parent: nn.Module, head: MaskedLanguageModelHead | None, num_rows: int, *, axis: Axis
) -> None:
    """Put empty embeddings of ``num_rows`` words, and a projection where there is a head, in place of the old.

    What was frozen stays frozen.
    """
    old = embedding_parent.word_embeddings
    assert isinstance(old, VocabParallelEmbedding)
    weight, features = old.weight, old.weight.shape[1]
    fresh = VocabParallelEmbedding(
        num_rows, features, axis=axis, dtype=weight.dtype, padding_idx=old.padding_idx
    )
    fresh.to(weight.device).weight.requires_grad_(weight.requires_grad)
    embedding_parent.word_embeddings = fresh
    if head is not None:
        bias = weight.new_zeros(padded_share(num_rows, axis))
        head.full_shapes = {"bias": (num_rows,)}
        head.bias = nn.Parameter(bias, requires_grad=head.bias.requires_grad)
        decoder = VocabParallelProjection(features, num_rows, axis=axis, dtype=weight.dtype)
        decoder.to(weight.device).weight.requires_grad_(head.decoder.weight.requires_grad)
        head.decoder = decoder


def name_decoder_bias(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    """`state_dict` hook: the bias under its second name too, as `transformers` has it."""
    if prefix + BIAS in state:
        state[prefix + DECODER_BIAS] = state[prefix + BIAS]


def take_decoder_bias(_module: nn.Module, state: dict[str, Any], prefix: str, *_rest: object) -> None:
    """`load_state_dict` hook: of two biases, the decoder's is the one that `transformers` computes with."""
    if prefix + DECODER_BIAS in state:
        state[prefix + BIAS] = state.pop(prefix + DECODER_BIAS)
