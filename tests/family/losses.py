"""Losses on this rank; the worker processes import this file."""

from pathlib import Path

import torch
from torch import Tensor

from tests.family.cases import PRETRAINING
from tests.family.passes import load, mesh_of


def loss_and_gradients(
    size: int, architecture: str, directory: Path, arguments: dict[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """Loss, and the gradients by parameter after its backward."""
    model = load(architecture, directory, mesh_of(size), torch.float64).train()
    loss = model(**arguments).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def parts_of_loss(size: int, directory: Path, arguments: dict[str, Tensor]) -> list[float]:
    """The sum, that of masked words, and that of sentence pairs."""
    output = load(PRETRAINING, directory, mesh_of(size), torch.float64).eval()(**arguments)
    return [each.item() for each in (output.loss, output.masked_lm_loss, output.next_sentence_loss)]
