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

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, bits: RandomBits | None) -> Tensor:
        """``[batch, sequence]`` ids and segments to ``[batch, sequence, hidden]``."""
        words = self.word_embeddings(input_ids)
        positions = self.position_embeddings.weight[: input_ids.shape[1]]
        embedded = words + self.token_type_embeddings(token_type_ids) + positions
        return dropout_add(
            embedded, None, bits, probability=self.probability, layer=0, place=Place.EMBEDDINGS
        )
