"""Word, position and segment embeddings of the first stage."""

import torch
from torch import Tensor, nn

from megatron_bert_tp.model.shape import ModelShape
from megatron_bert_tp.parallel.embedding import VocabParallelEmbedding
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.random_bits import Place, RandomBits, dropout_add


class Embeddings(nn.Module):
    """Sum of word, position and segment embeddings, then dropout; no LayerNorm, as MegatronBert has it."""

    def __init__(self, shape: ModelShape, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        hidden = shape.hidden_size
        self.probability = shape.hidden_dropout_prob
        self.word_embeddings = VocabParallelEmbedding(
            shape.vocab_size, hidden, axis=axis, dtype=dtype, padding_idx=shape.pad_token_id
        )
        self.position_embeddings = nn.Embedding(shape.max_position_embeddings, hidden, dtype=dtype)
        self.token_type_embeddings = nn.Embedding(shape.type_vocab_size, hidden, dtype=dtype)
        self.has_positions = not shape.is_relative

    def forward(
        self,
        words: Tensor,
        token_type_ids: Tensor,
        bits: RandomBits | None,
        *,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Ids ``[batch, sequence]``, or embedded words ``[batch, sequence, hidden]``, to the latter's shape.

        Positions count from 0 unless ``position_ids`` ``[1 or batch, sequence]`` are given; relative ones are
        not added here.
        """
        if not words.is_floating_point():
            words = self.word_embeddings(words)
        embedded = words + self.token_type_embeddings(token_type_ids)
        if self.has_positions:
            embedded = embedded + self._positions(position_ids, words.shape[1])
        return dropout_add(
            embedded, None, bits, probability=self.probability, layer=0, place=Place.EMBEDDINGS
        )

    def _positions(self, position_ids: Tensor | None, length: int) -> Tensor:
        if position_ids is None:
            return self.position_embeddings.weight[:length]
        positions: Tensor = self.position_embeddings(position_ids)
        return positions
