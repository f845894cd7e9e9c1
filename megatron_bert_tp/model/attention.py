"""Self-attention over this rank's heads, with dropout whose bits no layout changes."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bert_tp.model.shape import ModelShape
from megatron_bert_tp.parallel.linear import QueryKeyValueLinear, RowParallelLinear, load_blocks_of, share_of
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.random_bits import (
    Place,
    RandomBits,
    dropout_add,
    dropped_share,
    keep_mask,
    scaled_mask,
)


class _DroppedAttention(torch.autograd.Function):
    """``dropout(softmax(q k^T / sqrt(d) + mask)) v``, keeping one matrix of probabilities and a byte mask.

    Backward, with P the softmax, D = P * keep / (1 - p) and C = D V the output: the softmax' row sums
    ``sum(dP * P)`` equal ``sum(dC * C)`` over the features (Dao et al. 2022, appendix B), so the gradient of
    the scores is ``D * (dC V^T) - P * rowsum(dC * C)``.
    """

    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, padding: Tensor | None, keep: Tensor, probability: float
    ) -> Tensor:
        query, key, value = packed.flatten(1, 2)
        scale = 1 / math.sqrt(packed.shape[-1])
        scores = torch.baddbmm(query.new_empty(()), query, key.mT, beta=0, alpha=scale)
        scores = scores.view(keep.shape)
        if padding is not None:
            scores.add_(padding)
        softmax = torch.softmax(scores, -1)
        dropped = scaled_mask(keep, probability, softmax.dtype).mul_(softmax)
        context = torch.bmm(dropped.flatten(0, 1), value)
        ctx.save_for_backward(packed, softmax, keep, context)
        ctx.probability = probability
        return context.view(packed.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        packed, softmax, keep, context = ctx.saved_tensors
        query, key, value = packed.flatten(1, 2)
        scale = 1 / math.sqrt(packed.shape[-1])
        grad = grads[0].reshape(context.shape)
        dropped = scaled_mask(keep, ctx.probability, softmax.dtype).mul_(softmax).flatten(0, 1)
        grad_packed = torch.empty_like(packed)
        grad_query, grad_key, grad_value = grad_packed.flatten(1, 2)
        torch.bmm(dropped.mT, grad, out=grad_value)
        row_sums = (grad * context).sum(-1, keepdim=True)
        grad_scores = dropped.mul_(torch.bmm(grad, value.mT))
        grad_scores.addcmul_(softmax.flatten(0, 1), row_sums, value=-1).mul_(scale)
        torch.bmm(grad_scores, key, out=grad_query)
        torch.bmm(grad_scores.mT, query, out=grad_key)
        return grad_packed, None, None, None


def attend(packed: Tensor, padding: Tensor | None, keep: Tensor | None, probability: float) -> Tensor:
    """Attention of packed ``[3, batch, heads, sequence, head]`` to ``[batch, heads, sequence, head]``.

    ``padding`` ``[batch, 1, 1, sequence]`` is added to the scores; ``keep`` ``[batch, heads, sequence,
    sequence]`` is the mask of dropout.  Without dropout torch's own attention is used: it has no way to take
    our bits, and ours has no need to be faster than it.
    """
    if keep is None:
        query, key, value = packed
        return F.scaled_dot_product_attention(query, key, value, attn_mask=padding)
    context: Tensor = _DroppedAttention.apply(packed, padding, keep, probability)
    return context


def padding_of(attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Additive mask ``[batch, 1, 1, sequence]``: 0 at real keys, the lowest number at padding."""
    if attention_mask is None:
        return None
    lowest = torch.finfo(dtype).min
    return torch.zeros_like(attention_mask, dtype=dtype).masked_fill_(~attention_mask, lowest)[:, None, None]


class SelfAttention(nn.Module):
    """Query, key and value of this rank's heads, and their attention (Shoeybi et al. 2019, figure 3b)."""

    def __init__(self, shape: ModelShape, number: int, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        self.number = number
        self.probability = shape.attention_probs_dropout_prob
        self.max_positions = shape.max_position_embeddings
        num_heads = share_of(shape.num_attention_heads, axis, "num_attention_heads")
        self.heads = range(axis.rank * num_heads, (axis.rank + 1) * num_heads)
        self.head_size = shape.head_size
        self.query_key_value = QueryKeyValueLinear(
            shape.hidden_size, shape.hidden_size, axis=axis, dtype=dtype
        )
        load_blocks_of(self, "query_key_value")

    def forward(self, x: Tensor, padding: Tensor | None, bits: RandomBits | None) -> Tensor:
        """``[batch, sequence, hidden]`` to ``[batch, sequence, hidden / size]``: this rank's heads in a row."""
        batch, sequence, _ = x.shape
        projected = self.query_key_value(x).view(batch, sequence, 3, len(self.heads), self.head_size)
        packed = projected.permute(2, 0, 3, 1, 4).contiguous()
        context = attend(packed, padding, self._keep(bits, sequence, x.device), self.probability)
        return context.transpose(1, 2).reshape(batch, sequence, -1)

    def _keep(self, bits: RandomBits | None, sequence: int, device: torch.device) -> Tensor | None:
        if bits is None or dropped_share(self.probability) == 0:
            return None
        lanes = bits.attention(
            self.number, heads=self.heads, positions=sequence, max_positions=self.max_positions
        )
        return keep_mask(lanes, self.probability).to(device, non_blocking=True)


class AttentionOutput(nn.Module):
    """Projection of the joined heads, then dropout and the residual."""

    def __init__(self, shape: ModelShape, number: int, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        self.number, self.probability = number, shape.hidden_dropout_prob
        self.dense = RowParallelLinear(shape.hidden_size, shape.hidden_size, axis=axis, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor, bits: RandomBits | None) -> Tensor:
        """This rank's ``[batch, sequence, hidden / size]`` to ``[batch, sequence, hidden]``."""
        place = Place.ATTENTION_OUTPUT
        return dropout_add(
            self.dense(x), residual, bits, probability=self.probability, layer=self.number, place=place
        )


class AttentionBlock(nn.Module):
    """First sublayer: ``x + dropout(dense(attention(ln(x))))``."""

    def __init__(self, shape: ModelShape, number: int, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps, dtype=dtype)
        self.self = SelfAttention(shape, number, axis=axis, dtype=dtype)
        self.output = AttentionOutput(shape, number, axis=axis, dtype=dtype)

    def forward(self, x: Tensor, padding: Tensor | None, bits: RandomBits | None) -> Tensor:
        """``[batch, sequence, hidden]`` to the same shape."""
        output: Tensor = self.output(self.self(self.ln(x), padding, bits), x, bits)
        return output
