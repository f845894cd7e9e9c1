"""Linear layers whose weights are split over the tensor axis (Shoeybi et al. 2019, section 3)."""

from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bert_tp.errors import LayoutError
from megatron_bert_tp.parallel.collectives import start_sum_over_, sum_over_
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.sharding import Sharding, padded_share


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


class _ColumnProduct(torch.autograd.Function):
    """``x W^T + b`` whose backward adds the input gradient over the axis while it multiplies the weights'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.axis, ctx.has_bias = axis, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = _flat(grads[0])
        # Under autocast the product, and so its gradient, has another number format than what went in.
        grad_x = grad.matmul(weight.to(grad.dtype)).view(x.shape)
        summing = start_sum_over_(grad_x, ctx.axis)
        grad_weight = grad.t().matmul(_flat(x).to(grad.dtype)).to(weight.dtype)
        grad_bias = grad.sum(0).to(weight.dtype) if ctx.has_bias else None
        if summing is not None:
            summing.wait()
        return grad_x.to(x.dtype), grad_weight, grad_bias, None


class _RowProduct(torch.autograd.Function):
    """``sum_r x_r W_r^T + b``: the all-reduce is in the forward, the backward needs no message."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, axis: Axis) -> Tensor:
        ctx.save_for_backward(x, weight)
        if axis.size == 1:
            return F.linear(x, weight, bias)
        # Bias after the all-reduce: inside it, every rank would add it once.
        return _add_bias_(sum_over_(F.linear(x, weight), axis), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad = _flat(grads[0])
        grad_x = grad.matmul(weight.to(grad.dtype)).view(x.shape).to(x.dtype)
        grad_weight = grad.t().matmul(_flat(x).to(grad.dtype)).to(weight.dtype)
        return grad_x, grad_weight, grad.sum(0).to(weight.dtype), None


def _add_bias_(product: Tensor, bias: Tensor) -> Tensor:
    return product.add_(bias.to(product.dtype))


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
    """

    SHARDINGS: ClassVar[dict[str, Sharding]] = {"weight": Sharding(dim=0), "bias": Sharding(dim=0)}

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
        product: Tensor = _ColumnProduct.apply(x, self.weight, self.bias, self.axis)
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
        product: Tensor = _ColumnProduct.apply(x, self.weight, self.bias, self.axis)
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
    ``[..., in / size]``, output ``[..., out]``, equal on all ranks.
    """

    SHARDINGS: ClassVar[dict[str, Sharding]] = {"weight": Sharding(dim=1)}

    def __init__(self, in_features: int, out_features: int, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        share = share_of(in_features, axis, "in_features")
        self.axis = axis
        self.full_shapes = {"weight": (out_features, in_features)}
        self.weight = nn.Parameter(torch.empty(out_features, share, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """This rank's ``[..., in / size]`` to ``[..., out]``, equal on all ranks."""
        product: Tensor = _RowProduct.apply(x, self.weight, self.bias, self.axis)
        return product


class VocabParallelProjection(nn.Module):
    """Logits over a vocabulary whose rows are split over the tensor axis.

    Input ``[..., in]``, output ``[..., share]``: the logits of this rank's rows, padding included, which
    `vocab_parallel_cross_entropy` leaves out.  The bias belongs to whoever owns the name (Hugging Face's
    ``cls.predictions.bias``) and is passed in.
    """

    SHARDINGS: ClassVar[dict[str, Sharding]] = {"weight": Sharding(dim=0)}

    def __init__(self, in_features: int, num_rows: int, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        self.axis = axis
        self.full_shapes = {"weight": (num_rows, in_features)}
        self.weight = nn.Parameter(torch.zeros(padded_share(num_rows, axis), in_features, dtype=dtype))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """``[..., in]`` to this rank's ``[..., share]``; ``bias`` is ``[share]``."""
        product: Tensor = _ColumnProduct.apply(x, self.weight, bias, self.axis)
        return product
