"""One transformer layer of MegatronBert: LayerNorm before each sublayer (Shoeybi et al. 2019, figure 7b)."""

import torch
from torch import Tensor, nn

from megatron_bert_tp.errors import ConfigError
from megatron_bert_tp.model.activations import ACTIVATION_FUNCTIONS
from megatron_bert_tp.model.attention import AttentionBlock
from megatron_bert_tp.model.context import Attended, Context, Kept, LayerCache
from megatron_bert_tp.model.dropout import dropout_add_of
from megatron_bert_tp.model.shape import ModelShape
from megatron_bert_tp.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.random_bits import Place, RandomBits
from megatron_bert_tp.parallel.replicated import LayerNorm
from megatron_bert_tp.parallel.triton_dropout import TokenBits


class Intermediate(nn.Module):
    """First half of the MLP: column-parallel, then the activation, so each rank keeps its own features."""

    def __init__(self, shape: ModelShape, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        self.activation = ACTIVATION_FUNCTIONS[shape.hidden_act]
        self.dense = ColumnParallelLinear(
            shape.hidden_size, shape.intermediate_size, axis=axis, dtype=dtype, what="intermediate_size"
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden]`` to this rank's ``[..., intermediate / size]``."""
        return self.activation(self.dense(x))


class Output(nn.Module):
    """Second half of the MLP: row-parallel, then dropout and the residual."""

    def __init__(self, shape: ModelShape, number: int, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        self.number, self.probability = number, shape.hidden_dropout_prob
        self.dense = RowParallelLinear(shape.intermediate_size, shape.hidden_size, axis=axis, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor, bits: RandomBits | TokenBits | None) -> Tensor:
        """This rank's ``[..., intermediate / size]`` to ``[..., hidden]``."""
        place = Place.MLP_OUTPUT
        return dropout_add_of(
            self.dense, x, residual, bits, probability=self.probability, layer=self.number, place=place
        )


class Layer(nn.Module):
    """``y = x + drop(attention(ln(x)))``, then ``y + drop(W2 act(W1 ln(y)))``; ``number`` is global.

    A decoder with cross-attention has the sublayer ``crossattention`` between the two.
    """

    def __init__(self, shape: ModelShape, number: int, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        self.number = number
        self.attention = AttentionBlock(shape, number, is_cross=False, axis=axis, dtype=dtype)
        if shape.add_cross_attention:
            self.crossattention = AttentionBlock(shape, number, is_cross=True, axis=axis, dtype=dtype)
        self.ln = LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps, dtype=dtype)
        self.intermediate = Intermediate(shape, axis=axis, dtype=dtype)
        self.output = Output(shape, number, axis=axis, dtype=dtype)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Kept]:
        """``[batch, sequence, hidden]`` to the same shape, and what the context asks for."""
        own: Attended = self.attention(x, context)
        cross = self._look_at_encoder(own.hidden, context)
        hidden = own.hidden if cross is None else cross.hidden
        output: Tensor = self.output(self.intermediate(self.ln(hidden)), hidden, context.hidden_bits)
        return output, _kept(own, cross, context)

    def _look_at_encoder(self, x: Tensor, context: Context) -> Attended | None:
        if not context.sees_encoder(self.number):
            return None
        if not hasattr(self, "crossattention"):
            raise ConfigError(
                "encoder_hidden_states need cross-attention layers, and this model has none; make it with "
                "is_decoder=True and add_cross_attention=True"
            )
        attended: Attended = self.crossattention(x, context)
        return attended


def _kept(own: Attended, cross: Attended | None, context: Context) -> Kept:
    """Nothing that was not asked for: it would live as long as the pass."""
    asked = context.keeps_probabilities
    cache = None
    if context.keeps_cache:
        assert own.seen is not None
        cache = LayerCache(own.seen, cross.seen if cross else None)
    return Kept(
        probabilities=own.probabilities if asked else None,
        cross_probabilities=cross.probabilities if asked and cross else None,
        cache=cache,
    )
