"""Self- and cross-attention over this rank's heads, and the sublayer around either."""

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_bert_tp.model.context import Attended, Context, KeysValues
from megatron_bert_tp.model.dot_product import attend, attend_openly, distance_scores
from megatron_bert_tp.model.dropout import dropout_add_of
from megatron_bert_tp.model.shape import ModelShape
from megatron_bert_tp.parallel.collectives import copy_to
from megatron_bert_tp.parallel.linear import (
    ColumnParallelLinear,
    QueryKeyValueLinear,
    RowParallelLinear,
    load_blocks_of,
    share_of,
)
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.random_bits import Place, RandomBits, dropped_share, keep_mask
from megatron_bert_tp.parallel.replicated import LayerNorm
from megatron_bert_tp.parallel.triton_attention import LARGEST_HEAD, PairBits
from megatron_bert_tp.parallel.triton_attention import attend as attend_in_kernels
from megatron_bert_tp.parallel.triton_dropout import TokenBits


class _Heads(nn.Module):
    """What both kinds of attention share: the heads of this rank, their dropout, and relative positions."""

    place = Place.ATTENTION_PROBABILITIES

    def __init__(self, shape: ModelShape, number: int, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        self.number, self.axis = number, axis
        self.probability = shape.attention_probs_dropout_prob
        self.max_positions = shape.max_position_embeddings
        num_heads = share_of(shape.num_attention_heads, axis, "num_attention_heads")
        self.heads = range(axis.rank * num_heads, (axis.rank + 1) * num_heads)
        self.head_size = shape.head_size
        self.has_key_distances = shape.position_embedding_type == "relative_key_query"
        self.distance_embedding: nn.Embedding | None = None
        if shape.is_relative:
            self.distance_embedding = nn.Embedding(2 * self.max_positions - 1, self.head_size, dtype=dtype)

    def split(self, projected: Tensor) -> Tensor:
        """``[batch, sequence, heads x head]`` of this rank to ``[batch, heads, sequence, head]``."""
        heads: Tensor = projected.unflatten(-1, (len(self.heads), self.head_size))
        return heads.transpose(1, 2)

    def attend(
        self, query: Tensor, seen: KeysValues, context: Context, *, mask: Tensor | None, first_query: int
    ) -> Attended:
        """Attention of ``query``, the first of which is at position ``first_query``, step by step."""
        heads, probabilities = attend_openly(
            query,
            seen.keys,
            seen.values,
            mask=self._own_heads(mask),
            keep=self._keep(context.bits, query, first_query=first_query, keys=seen.length),
            probability=self.probability,
            head_mask=context.layer_head_mask(self.number),
            distances=self._distances(query, seen.keys, first_query),
        )
        return Attended(_joined(heads), probabilities, seen)

    def _distances(self, query: Tensor, key: Tensor, first_query: int) -> Tensor | None:
        if self.distance_embedding is None:
            return None
        # Every rank has the whole embedding and uses it for its own heads: the gradients are parts of a sum.
        embedding = copy_to(self.distance_embedding.weight, self.axis)
        return distance_scores(
            query, key, embedding, first_query=first_query, with_keys=self.has_key_distances
        )

    def _own_heads(self, mask: Tensor | None) -> Tensor | None:
        """This rank's share of a mask that has one matrix for each head."""
        if mask is None or mask.shape[1] == 1:
            return mask
        return mask[:, self.heads.start : self.heads.stop]

    def _keep(
        self, bits: RandomBits | None, query: Tensor, *, first_query: int, keys: int
    ) -> Tensor | None:
        """Mask of dropout ``[batch, heads, queries, keys]``."""
        if bits is None or dropped_share(self.probability) == 0:
            return None
        end = first_query + query.shape[2]
        positions = max(end, keys)
        lanes = bits.attention(
            self.number,
            heads=self.heads,
            positions=positions,
            max_positions=max(positions, self.max_positions),
            place=self.place,
        )
        if (end, keys) != (positions, positions) or first_query:
            lanes = lanes[:, :, first_query:end, :keys].contiguous()
        return keep_mask(lanes, self.probability).to(query.device, non_blocking=True)


class SelfAttention(_Heads):
    """Query, key and value of this rank's heads, and their attention (Shoeybi et al. 2019, figure 3b)."""

    def __init__(self, shape: ModelShape, number: int, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__(shape, number, axis=axis, dtype=dtype)
        self.query_key_value = QueryKeyValueLinear(
            shape.hidden_size, shape.hidden_size, axis=axis, dtype=dtype
        )
        load_blocks_of(self, "query_key_value")

    def forward(self, x: Tensor, context: Context) -> Attended:
        """``[batch, sequence, hidden]`` to this rank's heads in a row, ``[batch, sequence, hidden / size]``.

        Where the sequence is split, this rank's tokens ``[1, tokens / size, hidden]`` to all ``[1, tokens, ...]``.
        """
        projected = self.query_key_value(x)
        if not context.recomputes_attention:
            return self._of_projected(projected, context)
        again = checkpoint(self._of_projected, projected, context, use_reentrant=False, preserve_rng_state=False)
        return cast(Attended, again)

    def _of_projected(self, projected: Tensor, context: Context) -> Attended:
        """Queries, keys and values of all tokens to the joined heads: the core attention."""
        if context.tokens is None:
            return self._of_whole(projected, context)
        attended = self._of_whole(context.tokens.rows(projected), context)
        return replace(attended, hidden=context.tokens.padded(attended.hidden))

    def _of_whole(self, projected: Tensor, context: Context) -> Attended:
        """Attention of ``[batch, sequence, 3 hidden / size]``, within each row or each sample of a packed one."""
        segments = context.segments
        if segments is None:
            return self._of_rows(projected, context)
        assert context.is_plain, "what attention leaves behind has no place in a packed row"
        parts = zip(segments.spread(projected), context.of_groups(), strict=True)
        return Attended(segments.join([self._of_rows(part, group).hidden for part, group in parts]))

    def _of_rows(self, projected: Tensor, context: Context) -> Attended:
        """Attention within each row of ``[batch, sequence, 3 hidden / size]``."""
        projected = projected.unflatten(-1, (3, len(self.heads), self.head_size))
        packed = projected.permute(2, 0, 3, 1, 4).contiguous()
        if context.is_plain and self.distance_embedding is None:
            return Attended(_joined(self._in_one_go(packed, context)))
        query, key, value = packed
        first_query = 0
        if context.past is not None:
            past = context.past[self.number].own
            key, value = torch.cat([past.keys, key], 2), torch.cat([past.values, value], 2)
            first_query = past.length
        return self.attend(
            query, KeysValues(key, value), context, mask=context.mask, first_query=first_query
        )

    def _in_one_go(self, packed: Tensor, context: Context) -> Tensor:
        """``[3, batch, heads, sequence, head]`` to ``[batch, heads, sequence, head]``, nothing kept in between."""
        mask, pairs = self._own_heads(context.mask), self._pair_bits(context, packed.shape[3])
        if pairs is None:
            keep = self._keep(context.bits, packed[0], first_query=0, keys=packed.shape[3])
            return attend(packed, mask, keep, self.probability)
        lengths = context.key_lengths
        mask = mask if lengths is None else None
        return attend_in_kernels(packed, mask, pairs, probability=self.probability, lengths=lengths)

    def _pair_bits(self, context: Context, positions: int) -> PairBits | None:
        """The bits where kernels compute attention; without dropout torch's own is the faster one."""
        if context.bits is None or context.kernel_bits is None or self.head_size > LARGEST_HEAD:
            return None
        if dropped_share(self.probability) == 0:
            return None
        (samples,) = context.kernel_bits.samples
        max_positions = max(positions, self.max_positions)
        return PairBits(context.bits.seed, samples, self.number, self.heads.start, max_positions)


class CrossAttention(_Heads):
    """Queries of a decoder over the states of an encoder, which may have another length."""

    place = Place.CROSS_ATTENTION_PROBABILITIES

    def __init__(self, shape: ModelShape, number: int, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__(shape, number, axis=axis, dtype=dtype)
        size = shape.hidden_size
        self.query = ColumnParallelLinear(size, size, axis=axis, dtype=dtype)
        self.key = ColumnParallelLinear(size, size, axis=axis, dtype=dtype)
        self.value = ColumnParallelLinear(size, size, axis=axis, dtype=dtype)

    def forward(self, x: Tensor, context: Context) -> Attended:
        """``[batch, sequence, hidden]`` to this rank's heads in a row, ``[batch, sequence, hidden / size]``."""
        past = None if context.past is None else context.past[self.number]
        return self.attend(
            self.split(self.query(x)),
            self._encoder(context.encoder_states) if past is None or past.cross is None else past.cross,
            context,
            mask=context.encoder_mask,
            first_query=0 if past is None else past.own.length,
        )

    def _encoder(self, states: Tensor | None) -> KeysValues:
        assert states is not None, "the layer calls its cross-attention only where there is something to see"
        return KeysValues(self.split(self.key(states)), self.split(self.value(states)))


class AttentionOutput(nn.Module):
    """Projection of the joined heads, then dropout and the residual."""

    def __init__(
        self, shape: ModelShape, number: int, *, place: Place, axis: Axis, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.number, self.place, self.probability = number, place, shape.hidden_dropout_prob
        self.dense = RowParallelLinear(shape.hidden_size, shape.hidden_size, axis=axis, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor, bits: RandomBits | TokenBits | None) -> Tensor:
        """This rank's ``[batch, sequence, hidden / size]`` to ``[batch, sequence, hidden]``."""
        return dropout_add_of(
            self.dense,
            x,
            residual,
            bits,
            probability=self.probability,
            layer=self.number,
            place=self.place,
        )


class AttentionBlock(nn.Module):
    """A sublayer ``x + dropout(dense(attention(ln(x))))``, of self- or, in a decoder, cross-attention."""

    def __init__(
        self, shape: ModelShape, number: int, *, is_cross: bool, axis: Axis, dtype: torch.dtype
    ) -> None:
        super().__init__()
        kind = CrossAttention if is_cross else SelfAttention
        place = Place.CROSS_ATTENTION_OUTPUT if is_cross else Place.ATTENTION_OUTPUT
        self.ln = LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps, dtype=dtype)
        self.self = kind(shape, number, axis=axis, dtype=dtype)
        self.output = AttentionOutput(shape, number, place=place, axis=axis, dtype=dtype)

    def forward(self, x: Tensor, context: Context) -> Attended:
        """``[batch, sequence, hidden]`` to the same shape."""
        attended: Attended = self.self(self.ln(x), context)
        return replace(attended, hidden=self.output(attended.hidden, x, context.hidden_bits))


def _joined(heads: Tensor) -> Tensor:
    """``[batch, heads, sequence, head]`` to ``[batch, sequence, heads x head]``."""
    return heads.transpose(1, 2).flatten(2)
