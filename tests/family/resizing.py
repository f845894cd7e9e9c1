"""A change of the vocabulary on this rank; the worker processes import this file."""

from pathlib import Path

import torch
from torch import Tensor

from tests.family.cases import MASKED
from tests.family.passes import load, mesh_of


@torch.no_grad()
def logits_before_and_after(
    size: int, directory: Path, inputs: dict[str, Tensor], number: int
) -> tuple[Tensor, Tensor]:
    """Whole logits with the vocabulary of the file, and with ``number`` words."""
    model = load(MASKED, directory, mesh_of(size), torch.float64).eval()
    before = model(**inputs).logits.clone()
    model.resize_token_embeddings(number)
    return before, model(**inputs).logits.clone()
