"""NVIDIA's apex in the place of torch's own kernels: thin, and only where it is installed.

apex is no dependency: it is built from source for one CUDA and one torch.  Names and meanings of the arguments
are those of apex/optimizers/fused_adam.py, fused_lamb.py and apex/normalization/fused_layer_norm.py.
"""

import math
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

from megatron_bert_tp.errors import ConfigError


def fused_adam(
    groups: list[dict[str, Any]], *, betas: tuple[float, float], epsilon: float
) -> torch.optim.Optimizer:
    """AdamW as one kernel over many tensors; float32 weights on a GPU, none of them empty."""
    optimizer: torch.optim.Optimizer = _apex("optimizers").FusedAdam(
        groups, betas=betas, eps=epsilon, bias_correction=True, adam_w_mode=True
    )
    return optimizer


def fused_lamb(
    groups: list[dict[str, Any]], *, betas: tuple[float, float], epsilon: float
) -> torch.optim.Optimizer:
    """LAMB whose norms are those of the tensors it is given, so they must be whole.

    A step writes over the gradients.  Gradients come clipped, so its own limit is out of reach.
    """
    optimizer: torch.optim.Optimizer = _apex("optimizers").FusedLAMB(
        groups,
        betas=betas,
        eps=epsilon,
        bias_correction=True,
        adam_w_mode=True,
        grad_averaging=True,
        max_grad_norm=math.inf,
        use_nvlamb=False,
    )
    return optimizer


def mixed_layer_norm() -> type[nn.Module]:
    """LayerNorm whose output has the number format of its weights; called as ``(normalized_shape, eps=...)``."""
    layer: type[nn.Module] = _apex("normalization").MixedFusedLayerNorm
    return layer


def _apex(name: str) -> ModuleType:
    try:
        return import_module(f"apex.{name}")
    except ImportError as error:
        raise ConfigError(
            f"run.fused = apex needs NVIDIA's apex, and apex.{name} cannot be imported ({error}); build it from "
            "https://github.com/NVIDIA/apex (the apex of PyPI is another package), or set run.fused: torch"
        ) from error
