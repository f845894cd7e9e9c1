"""The norm of all gradients of a model whose parameters are split over tensor ranks, and its limit."""

import math
from collections.abc import Sequence

import torch

from megatron_bert_tp.parallel.collectives import sum_over_
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.sharding import Part


def clip_(parts: Sequence[Part], axis: Axis, max_norm: float) -> float:
    """Scale the gradients behind ``parts`` to a norm of at most ``max_norm``; returns the norm before.

    Every tensor counts once: replicated ones on the first rank of ``axis``, all of which must call it.
    """
    gradients = {id(part.parameter): part.parameter.grad for part in parts if part.parameter.grad is not None}
    total = torch.zeros((), dtype=torch.float64, device=parts[0].parameter.device)
    for part in parts:
        gradient = gradients.get(id(part.parameter))
        if part.is_counted_here and gradient is not None:
            total += part.view(gradient).double().square().sum()
    norm = math.sqrt(sum_over_(total, axis).item())
    if norm > max_norm:
        torch._foreach_mul_([each for each in gradients.values() if each is not None], max_norm / norm)
    return norm
