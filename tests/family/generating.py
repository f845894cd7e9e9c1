"""Words that a language model goes on with on this rank; the worker processes import this file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.family.cases import CAUSAL
from tests.family.passes import load, mesh_of


def words_of(size: int, directory: Path, prompts: Tensor, settings: list[dict[str, Any]]) -> list[Tensor]:
    """Prompts and what follows, for each of the settings."""
    model = load(CAUSAL, directory, mesh_of(size), torch.float64)
    return [model.generate(prompts, **each) for each in settings]
