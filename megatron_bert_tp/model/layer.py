"""One transformer layer of MegatronBert: LayerNorm before each sublayer (Shoeybi et al. 2019, figure 7b)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bert_tp.model.attention import AttentionBlock
from megatron_bert_tp.model.shape import ModelShape
from megatron_bert_tp.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.random_bits import Place, RandomBits, dropout_add


class Intermediate(nn.Module):
    """First half of the MLP: column-parallel, then GELU, so each rank keeps its own features."""

    def __init__(self, shape: ModelShape, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        self.dense = ColumnParallelLinear(shape.hidden_size, shape.intermediate_size, axis=axis, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden]`` to this rank's ``[..., intermediate / size]``."""
        return F.gelu(self.dense(x))


class Output(nn.Module):
    """Second half of the MLP: row-parallel, then dropout and the residual."""

    def __init__(self, shape: ModelShape, number: int, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        self.number, self.probability = number, shape.hidden_dropout_prob
        self.dense = RowParallelLinear(shape.intermediate_size, shape.hidden_size, axis=axis, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor, bits: RandomBits | None) -> Tensor:
        """This rank's ``[..., intermediate / size]`` to ``[..., hidden]``."""
        place = Place.MLP_OUTPUT
        return dropout_add(
            self.dense(x), residual, bits, probability=self.probability, layer=self.number, place=place
        )


class Layer(nn.Module):
    """``y = x + drop(attention(ln(x)))``, then ``y + drop(W2 gelu(W1 ln(y)))``; ``number`` is global."""

    def __init__(self, shape: ModelShape, number: int, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention = AttentionBlock(shape, number, axis=axis, dtype=dtype)
        self.ln = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps, dtype=dtype)
        self.intermediate = Intermediate(shape, axis=axis, dtype=dtype)
        self.output = Output(shape, number, axis=axis, dtype=dtype)

    def forward(self, x: Tensor, padding: Tensor | None, bits: RandomBits | None) -> Tensor:
        """``[batch, sequence, hidden]`` to the same shape."""
        attended = self.attention(x, padding, bits)
        output: Tensor = self.output(self.intermediate(self.ln(attended)), attended, bits)
        return output
