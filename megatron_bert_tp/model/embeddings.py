"""Word, position and segment embeddings of the first stage."""

import torch
from torch import Tensor, nn

from megatron_bert_tp.model.dropout import dropout_add
from megatron_bert_tp.model.shape import ModelShape
from megatron_bert_tp.parallel.embedding import VocabParallelEmbedding
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.random_bits import Place, RandomBits
from megatron_bert_tp.parallel.replicated import ReplicatedEmbedding
from megatron_bert_tp.parallel.token_runs import TokenRuns
from megatron_bert_tp.parallel.triton_dropout import TokenBits


class Embeddings(nn.Module):
    """Sum of word, position and segment embeddings, then dropout; no LayerNorm, as MegatronBert has it."""

    def __init__(self, shape: ModelShape, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        self.padding_id = shape.pad_token_id
        hidden = shape.hidden_size
        self.probability = shape.hidden_dropout_prob
        self.word_embeddings = VocabParallelEmbedding(
            shape.vocab_size, hidden, axis=axis, dtype=dtype, padding_idx=shape.pad_token_id
        )
        self.position_embeddings = ReplicatedEmbedding(shape.max_position_embeddings, hidden, dtype=dtype)
        self.token_type_embeddings = ReplicatedEmbedding(shape.type_vocab_size, hidden, dtype=dtype)
        self.has_positions = not shape.is_relative

    def forward(
        self,
        words: Tensor,
        token_type_ids: Tensor,
        bits: RandomBits | TokenBits | None,
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

    def of_run(
        self,
        ids: Tensor,
        token_type_ids: Tensor,
        bits: RandomBits | TokenBits | None,
        *,
        tokens: TokenRuns,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Ids ``[batch, sequence]`` to this rank's run ``[1, tokens / size, hidden]`` of what `forward` gives.

        The word embeddings must split the sequence; ``bits`` are those of the run.
        """
        if position_ids is None:
            position_ids = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        words = self.word_embeddings(tokens.padded(ids, value=self.padding_id))
        own_types, own_positions = tokens.of_rank(token_type_ids), tokens.of_rank(position_ids)
        return self.forward(words, own_types, bits, position_ids=own_positions)

    def _positions(self, position_ids: Tensor | None, length: int) -> Tensor:
        if position_ids is None:
            return self.position_embeddings.weight[:length]
        positions: Tensor = self.position_embeddings(position_ids)
        return positions
