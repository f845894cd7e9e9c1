"""Linear layers whose weights are split over the tensor axis (Shoeybi et al. 2019, section 3).

What a layer has beside its weights is set by whoever puts layers together: ``weight_gradients``, with which the
gradients of weight and bias can be put off, and ``splits_sequence``, for hidden states of which each rank has
its own tokens ``[1, tokens / size, hidden]`` (Korthikanti et al. 2022).
"""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatron_bert_tp.errors import LayoutError
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.products import (
    ColumnProduct,
    GatheredColumnProduct,
    RowProduct,
    ScatteredRowProduct,
)
from megatron_bert_tp.parallel.sharding import Sharding, padded_share
from megatron_bert_tp.parallel.weight_gradients import WeightGradients


def share_of(features: int, axis: Axis, what: str) -> int:
    """Features per rank; raises `LayoutError` when they do not divide."""
    if features % axis.size:
        divisors = [str(size) for size in range(1, features + 1) if features % size == 0]
        raise LayoutError(
            f"{what} ({features}) must be a multiple of the {axis.name} size ({axis.size}); sizes that work: "
            f"{', '.join(divisors[:12])}"
        )
    return features // axis.size


class ColumnParallelLinear(nn.Module):
    """Linear layer whose output features are split over the tensor axis.

    ``Y_r = X A_r + b_r``: input ``[..., in]``, equal on all ranks, output ``[..., out / size]``.  The backward
    adds the input gradients of all ranks with one all-reduce, hidden behind the weight gradient's product.
    Where the sequence is split, the input ``[1, tokens / size, in]`` is gathered to ``[1, tokens, out / size]``.
    """

    SHARDINGS: ClassVar[dict[str, Sharding]] = {"weight": Sharding(dim=0), "bias": Sharding(dim=0)}
    weight_gradients: WeightGradients | None = None
    splits_sequence = False

    def __init__(
        self, in_features: int, out_features: int, *, axis: Axis, dtype: torch.dtype, what: str = "out_features"
    ) -> None:
        """``what`` names ``out_features`` in errors."""
        super().__init__()
        share = share_of(out_features, axis, what)
        self.axis = axis
        self.full_shapes = {"weight": (out_features, in_features), "bias": (out_features,)}
        self.weight = nn.Parameter(torch.empty(share, in_features, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(share, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to this rank's ``[..., out / size]``."""
        kind = GatheredColumnProduct if self.splits_sequence else ColumnProduct
        product: Tensor = kind.apply(x, self.weight, self.bias, self.axis, self.weight_gradients)
        return product


class QueryKeyValueLinear(nn.Module):
    """Query, key and value projections as one product; every rank computes the three for its own heads.

    Input ``[..., in]``, output ``[..., 3 * out / size]``: this rank's queries, then keys, then values.  The
    fused storage shows only here: names, `state_dict` and files know ``query``, ``key`` and ``value``.
    """

    BLOCKS = ("query", "key", "value")
    SHARDINGS: ClassVar[dict[str, Sharding]] = {
        "weight": Sharding(dim=0, blocks=BLOCKS),
        "bias": Sharding(dim=0, blocks=BLOCKS),
    }
    weight_gradients: WeightGradients | None = None
    splits_sequence = False

    def __init__(self, in_features: int, out_features: int, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        share = len(self.BLOCKS) * share_of(out_features, axis, "out_features")
        self.axis = axis
        self.full_shapes = {"weight": (out_features, in_features), "bias": (out_features,)}
        self.weight = nn.Parameter(torch.empty(share, in_features, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(share, dtype=dtype))
        self.register_state_dict_post_hook(_name_blocks)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to this rank's ``[..., 3 * out / size]``."""
        kind = GatheredColumnProduct if self.splits_sequence else ColumnProduct
        product: Tensor = kind.apply(x, self.weight, self.bias, self.axis, self.weight_gradients)
        return product


def _block_keys(prefix: str, key: str) -> list[str]:
    parent = prefix.removesuffix(".").rpartition(".")[0]
    return [".".join(filter(None, (parent, block, key))) for block in QueryKeyValueLinear.BLOCKS]


def _name_blocks(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    """`state_dict` hook: the fused tensors leave under the names of their blocks."""
    for key in ("weight", "bias"):
        fused = state.pop(prefix + key)
        state.update(zip(_block_keys(prefix, key), fused.chunk(len(QueryKeyValueLinear.BLOCKS)), strict=True))


def load_blocks_of(parent: nn.Module, child: str) -> None:
    """Let ``parent.load_state_dict`` take the blocks of its `QueryKeyValueLinear` called ``child``.

    torch hands a module only the keys below its own name, and the blocks stand beside it: so the parent joins
    them.  Missing blocks are reported as missing.
    """
    parent.register_load_state_dict_pre_hook(partial(_join_blocks, child))


def _join_blocks(child: str, _module: nn.Module, state: dict[str, Any], prefix: str, *_rest: object) -> None:
    for key in ("weight", "bias"):
        names = _block_keys(f"{prefix}{child}.", key)
        if all(name in state for name in names):
            state[f"{prefix}{child}.{key}"] = torch.cat([state.pop(name) for name in names])


class RowParallelLinear(nn.Module):
    """Linear layer whose input features are split over the tensor axis.

    ``Y = sum_r X_r A_r + b``: each rank multiplies its part, one all-reduce adds them.  Input
    ``[..., in / size]``, output ``[..., out]``, equal on all ranks.  Where the sequence is split, the sum of
    ``[1, tokens, in / size]`` is scattered to ``[1, tokens / size, out]`` and the bias is added to that.
    """

    SHARDINGS: ClassVar[dict[str, Sharding]] = {
        "weight": Sharding(dim=1),
        "bias": Sharding(over_sequence=True),
    }
    weight_gradients: WeightGradients | None = None
    splits_sequence = False

    def __init__(self, in_features: int, out_features: int, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        share = share_of(in_features, axis, "in_features")
        self.axis = axis
        self.full_shapes = {"weight": (out_features, in_features)}
        self.weight = nn.Parameter(torch.empty(out_features, share, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """This rank's ``[..., in / size]`` to ``[..., out]``, equal on all ranks."""
        return self._multiplied(x, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """The same without the bias, for a kernel that adds it with what follows; its gradient is autograd's."""
        return self._multiplied(x, None)

    def _multiplied(self, x: Tensor, bias: Tensor | None) -> Tensor:
        kind = ScatteredRowProduct if self.splits_sequence else RowProduct
        product: Tensor = kind.apply(x, self.weight, bias, self.axis, self.weight_gradients)
        return product


class VocabParallelProjection(nn.Module):
    """Logits over a vocabulary whose rows are split over the tensor axis.

    Input ``[..., in]``, output ``[..., share]``: the logits of this rank's rows, padding included, which
    `vocab_parallel_cross_entropy` leaves out.  The bias belongs to whoever owns the name (Hugging Face's
    ``cls.predictions.bias``) and is passed in.
    """

    SHARDINGS: ClassVar[dict[str, Sharding]] = {"weight": Sharding(dim=0)}
    weight_gradients: WeightGradients | None = None

    def __init__(self, in_features: int, num_rows: int, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        self.axis = axis
        self.full_shapes = {"weight": (num_rows, in_features)}
        self.weight = nn.Parameter(torch.zeros(padded_share(num_rows, axis), in_features, dtype=dtype))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """``[..., in]`` to this rank's ``[..., share]``; ``bias`` is ``[share]``."""
        product: Tensor = ColumnProduct.apply(x, self.weight, bias, self.axis, self.weight_gradients)
        return product


ParallelLinear = ColumnParallelLinear | QueryKeyValueLinear | RowParallelLinear | VocabParallelProjection
"""All layers whose weight gradients can be put off."""
