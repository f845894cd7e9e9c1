"""LAMB (You et al. 2020, "Large Batch Optimization for Deep Learning", algorithm 2) on rectangles of tensors.

Adam's update plus decoupled decay, scaled per tensor by norm(weight) / norm(update).  The norms are those of
the whole named tensor, however it is split over tensor ranks and owners.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_bert_tp.optim.roles import is_answered_here
from megatron_bert_tp.parallel.ownership import Owned

# On CPU a piece stays in the cache and is summed by one thread; elsewhere a piece costs a launch.
_PIECE_ON_CPU = 1 << 15
_PIECE = 1 << 24


class Lamb(torch.optim.Optimizer):
    """LAMB with bias correction, as in the paper and in NVIDIA's apex.

    The tensors of ``adapted`` have a trust ratio; all others (biases, LayerNorms) have the ratio 1, and so
    has a tensor whose weight or update is zero.  ``adapted`` names the same tensors in the same order on all
    ranks between which ``sum_over_owners`` adds; also a rank with 0 rows of each takes part in the sum.
    A step holds one more buffer of the size of the weights.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        epsilon: float,
        adapted: Sequence[Owned],
        sum_over_owners: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": epsilon, "weight_decay": 0.0, "step": 0})
        self._adapted = adapted
        self._sum_over_owners = sum_over_owners

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; sends the norms of all tensors in one message."""
        assert closure is None, "the gradients are there before the step"
        updates: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            updates.update(zip(group["params"], _updates(group, self.state), strict=True))
        ratios = dict(self._ratios(updates))
        for group in self.param_groups:
            weights = group["params"]
            if weights:
                moves = [updates[weight] for weight in weights]
                torch._foreach_mul_(moves, [-group["lr"] * ratios.get(weight, 1.0) for weight in weights])
                torch._foreach_add_(weights, moves)

    def _ratios(self, updates: Mapping[Tensor, Tensor]) -> Iterator[tuple[Tensor, float]]:
        """Trust ratio of every adapted weight, from the norms of whole tensors."""
        if not self._adapted:
            return
        squares = torch.zeros(2, len(self._adapted), dtype=torch.float64, device=self._adapted[0].weight.device)
        for place, each in enumerate(self._adapted):
            if each.weight in updates and is_answered_here(each.part):
                squares[0, place] = _square_sum(each.weight)
                squares[1, place] = _square_sum(updates[each.weight])
        norms = self._sum_over_owners(squares.view(-1)).sqrt().tolist()
        weight_norms, update_norms = norms[: len(self._adapted)], norms[len(self._adapted) :]
        for each, weight_norm, update_norm in zip(self._adapted, weight_norms, update_norms, strict=True):
            yield each.weight, weight_norm / update_norm if weight_norm and update_norm else 1.0


def _updates(group: dict[str, Any], state: Mapping[Tensor, Mapping[str, Tensor]]) -> list[Tensor]:
    """Advance the moments of a group; Adam's direction plus decay for each of its weights."""
    weights = group["params"]
    group["step"] += 1
    if not weights:
        return []
    beta1, beta2 = group["betas"]
    gradients = [weight.grad for weight in weights]
    first = [state[weight]["exp_avg"] for weight in weights]
    second = [state[weight]["exp_avg_sq"] for weight in weights]
    torch._foreach_lerp_(first, gradients, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
    updates = list(torch._foreach_div(second, 1 - beta2 ** group["step"]))
    torch._foreach_sqrt_(updates)
    torch._foreach_add_(updates, group["eps"])
    torch._foreach_reciprocal_(updates)
    torch._foreach_mul_(updates, first)
    torch._foreach_div_(updates, 1 - beta1 ** group["step"])
    if group["weight_decay"]:
        torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
    return updates


def _square_sum(tensor: Tensor) -> Tensor:
    size = _PIECE_ON_CPU if tensor.device.type == "cpu" else _PIECE
    pieces = tensor.reshape(-1).split(size)
    return torch.stack([piece.to(torch.float64, copy=True).square_().sum() for piece in pieces]).sum()
