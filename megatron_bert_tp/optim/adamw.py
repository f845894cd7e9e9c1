"""AdamW (Loshchilov and Hutter 2019) on this rank's parameters, and its state as named tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_bert_tp.parallel.sharding import Part

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class AdamWNumbers:
    """Constants of the update; decay is left out for biases and LayerNorms."""

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to the parameter: not to biases and LayerNorms."""
    return not name.endswith((".bias", ".ln.weight", ".LayerNorm.weight"))


def build_adamw(parameters: Mapping[str, nn.Parameter], numbers: AdamWNumbers) -> torch.optim.AdamW:
    """Fused AdamW; the rate of every step comes from `step_`."""
    decayed = [value for name, value in parameters.items() if is_decayed(name)]
    others = [value for name, value in parameters.items() if not is_decayed(name)]
    groups = [
        {"params": decayed, "weight_decay": numbers.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(numbers.beta1, numbers.beta2),
        eps=numbers.epsilon,
        fused=True,
    )


def step_(optimizer: torch.optim.AdamW, rate: float) -> None:
    """One update with learning rate ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def restart_(optimizer: torch.optim.AdamW, num_steps: int) -> None:
    """State after ``num_steps`` updates with moments at zero, ready to be filled from a checkpoint."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(num_steps), device=parameter.device),
                **{kind: torch.zeros_like(parameter) for kind in MOMENTS},
            }


def moment_of(optimizer: torch.optim.AdamW, kind: str) -> Callable[[Part], Tensor]:
    """Where one moment of a part lies: a tensor of the parameter's shape."""

    def tensor_of(part: Part) -> Tensor:
        moment: Tensor = optimizer.state[part.parameter][kind]
        return moment

    return tensor_of
