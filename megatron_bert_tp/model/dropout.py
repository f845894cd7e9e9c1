"""Dropout of hidden states with the residual: by torch, or by kernels where they are to draw the bits.

Who computes it is said by the bits: `RandomBits` are drawn on the host, `TokenBits` in the kernel.
"""

from torch import Tensor

from megatron_bert_tp.parallel import random_bits
from megatron_bert_tp.parallel.linear import RowParallelLinear
from megatron_bert_tp.parallel.random_bits import Place, RandomBits, dropped_share
from megatron_bert_tp.parallel.triton_dropout import TokenBits, bias_dropout_add


def dropout_add(
    x: Tensor,
    residual: Tensor | None,
    bits: RandomBits | TokenBits | None,
    *,
    probability: float,
    layer: int,
    place: Place,
) -> Tensor:
    """``residual + dropout(x)`` for hidden states ``[batch, sequence, hidden]``; no bits, no dropout."""
    if isinstance(bits, TokenBits):
        return bias_dropout_add(x, None, residual, bits, probability=probability, layer=layer, place=place)
    return random_bits.dropout_add(x, residual, bits, probability=probability, layer=layer, place=place)


def dropout_add_of(
    dense: RowParallelLinear,
    x: Tensor,
    residual: Tensor,
    bits: RandomBits | TokenBits | None,
    *,
    probability: float,
    layer: int,
    place: Place,
) -> Tensor:
    """``residual + dropout(dense(x))``; the kernel adds the bias too.

    The gradient of the bias then comes from autograd and is never put off; it is that of the tokens that
    ``residual`` has, as it is otherwise.
    """
    if isinstance(bits, TokenBits) and dropped_share(probability) > 0:
        product = dense.product(x)
        return bias_dropout_add(
            product, dense.bias, residual, bits, probability=probability, layer=layer, place=place
        )
    return dropout_add(dense(x), residual, bits, probability=probability, layer=layer, place=place)
