"""Update rules by name: one optimizer over the owned rectangles of a rank, and its state as named tensors.

The learning rate and the weight decay of a step come with `step_`.  State is made at once, so that a
checkpoint can be written or read before the first step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_bert_tp.optim import apex
from megatron_bert_tp.optim.lamb import Lamb
from megatron_bert_tp.optim.rate_factors import RateFactor, same_rate
from megatron_bert_tp.optim.roles import is_decayed
from megatron_bert_tp.parallel.ownership import Owned

SumOverOwners = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class OptimizerNumbers:
    """Name of the update rule and its constants; a rule reads those that its formula has."""

    name: str
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    momentum: float = 0.9
    weight_decay: float = 0.01

    @property
    def betas(self) -> tuple[float, float]:
        """Decay of both moments."""
        return self.beta1, self.beta2


@dataclass(frozen=True)
class _Work:
    """What a rule is built from; ``groups`` are torch's, without rectangles of 0 rows."""

    groups: list[dict[str, Any]]
    owned: Sequence[Owned]
    numbers: OptimizerNumbers
    sum_over_owners: SumOverOwners


def build_optimizer(
    owned: Sequence[Owned],
    numbers: OptimizerNumbers,
    *,
    sum_over_owners: SumOverOwners,
    factor: RateFactor = same_rate,
    fused: str = "torch",
) -> torch.optim.Optimizer:
    """Optimizer of all ``owned`` rectangles, with its gradients in place and its moments at zero.

    ``owned`` has the same tensors in the same order on all ranks between which ``sum_over_owners`` adds a
    float64 vector: those that hold other rectangles of these tensors (tensor axis and owners).  It adds in
    place and returns the vector; every step of LAMB calls it once on every rank, the others never.
    ``factor`` is on the rate of a tensor, by its name.  ``fused`` is whose kernels run: torch or apex.  Raises
    `ConfigError` where apex is not installed.
    """
    for each in owned:
        each.weight.grad = each.gradient
    work = _Work(_groups(owned, numbers, factor), owned, numbers, sum_over_owners)
    optimizer = _BUILDERS[fused, numbers.name](work)
    restart_(optimizer, 0)
    return optimizer


def step_(optimizer: torch.optim.Optimizer, *, rate: float, weight_decay: float) -> None:
    """One update with learning rate ``rate``, times the factor of a group; biases and LayerNorms do not decay."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
        group["weight_decay"] = weight_decay if group["is_decayed"] else 0.0
    optimizer.step()


def kinds_of(name: str) -> tuple[str, ...]:
    """Names of the moments that the rule keeps for every weight."""
    return _KINDS[name]


def restart_(optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    """State after ``num_steps`` updates with moments at zero, ready to be filled from a checkpoint.

    Steps that were skipped for an overflow are no updates.
    """
    for group in optimizer.param_groups:
        # torch counts updates per tensor, LAMB and apex per group; who does not count reads neither.
        group["step"] = num_steps
        for weight in group["params"]:
            optimizer.state[weight] = {
                "step": torch.tensor(float(num_steps), device=weight.device),
                **{kind: torch.zeros_like(weight) for kind in group["kinds"]},
            }


def moment_of(optimizer: torch.optim.Optimizer, kind: str) -> Callable[[Owned], Tensor]:
    """Where one moment of a rectangle lies: a tensor of its shape."""

    def tensor_of(owned: Owned) -> Tensor:
        if owned.weight.numel() == 0:
            return torch.zeros_like(owned.weight)
        moment: Tensor = optimizer.state[owned.weight][kind]
        return moment

    return tensor_of


def _groups(owned: Sequence[Owned], numbers: OptimizerNumbers, factor: RateFactor) -> list[dict[str, Any]]:
    """Weights of one rate, decayed and not; a group without any is left out unless all are."""
    # apex drops the work of a whole list whose last tensor is empty.
    held = [each for each in owned if each.weight.numel()]
    factors = sorted({factor(each.part.name) for each in owned} or {1.0}, reverse=True)
    groups = [
        {
            "params": [
                each.weight
                for each in held
                if is_decayed(each.part.name) is decayed and factor(each.part.name) == own
            ],
            "weight_decay": numbers.weight_decay if decayed else 0.0,
            "is_decayed": decayed,
            "factor": own,
            "kinds": kinds_of(numbers.name),
        }
        for own in factors
        for decayed in (True, False)
    ]
    return [group for group in groups if group["params"]] or groups


def _adamw(work: _Work) -> torch.optim.Optimizer:
    return torch.optim.AdamW(work.groups, betas=work.numbers.betas, eps=work.numbers.epsilon, fused=True)


def _sgd(work: _Work) -> torch.optim.Optimizer:
    return torch.optim.SGD(work.groups, momentum=work.numbers.momentum, fused=True)


def _lamb(work: _Work) -> torch.optim.Optimizer:
    adapted = [each for each in work.owned if is_decayed(each.part.name)]
    return Lamb(
        work.groups,
        betas=work.numbers.betas,
        epsilon=work.numbers.epsilon,
        adapted=adapted,
        sum_over_owners=work.sum_over_owners,
    )


def _apex_adamw(work: _Work) -> torch.optim.Optimizer:
    return apex.fused_adam(work.groups, betas=work.numbers.betas, epsilon=work.numbers.epsilon)


def _apex_lamb(work: _Work) -> torch.optim.Optimizer:
    return apex.fused_lamb(work.groups, betas=work.numbers.betas, epsilon=work.numbers.epsilon)


_ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
_KINDS: Mapping[str, tuple[str, ...]] = {
    "adamw": _ADAM_MOMENTS,
    "lamb": _ADAM_MOMENTS,
    "sgd": ("momentum_buffer",),
}
_BUILDERS: Mapping[tuple[str, str], Callable[[_Work], torch.optim.Optimizer]] = {
    ("torch", "adamw"): _adamw,
    ("torch", "lamb"): _lamb,
    ("torch", "sgd"): _sgd,
    ("apex", "adamw"): _apex_adamw,
    ("apex", "lamb"): _apex_lamb,
}
