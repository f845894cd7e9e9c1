"""What ranks hold, as pieces of whole tensors; joining them, and measuring how far two sets are apart."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bert_tp.objectives.pretraining import Losses
from megatron_bert_tp.parallel.sharding import Part


@dataclass(frozen=True)
class Piece:
    """A rectangle of one named tensor as one rank holds it."""

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True)
class StepRecord:
    """What one rank knows after a step."""

    losses: Losses
    norm: float
    gradients: list[Piece]
    weights: list[Piece]


@dataclass(frozen=True)
class Step:
    """A step of all ranks, tensors joined."""

    losses: Losses
    norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def piece_of(part: Part, like: Tensor) -> Piece:
    values = part.view(like.detach()).clone()
    assert tuple(values.shape) == part.local_shape
    return Piece(part.source, part.shape, part.offsets, values)


def own_piece(part: Part, values: Tensor) -> Piece:
    """What a rank holds of a tensor as a rectangle of its own, outside of any parameter."""
    assert tuple(values.shape) == part.local_shape
    return Piece(part.source, part.shape, part.offsets, values.clone())


def gradient_pieces(parts: Iterable[Part]) -> list[Piece]:
    return [piece_of(part, part.parameter.grad) for part in parts if part.parameter.grad is not None]


def weight_pieces(parts: Iterable[Part]) -> list[Piece]:
    return [piece_of(part, part.parameter) for part in parts]


def join(pieces: Iterable[Piece]) -> dict[str, Tensor]:
    """Whole tensors by name: every element is held by some rank, and ranks that share it agree to the bit."""
    wholes: dict[str, Tensor] = {}
    for piece in pieces:
        whole = wholes.setdefault(piece.name, torch.full(piece.shape, torch.nan, dtype=piece.values.dtype))
        window = whole[tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.values.shape, strict=True))]
        is_new = window.isnan()
        assert torch.equal(window[~is_new], piece.values[~is_new]), f"copies of {piece.name} differ"
        window.copy_(piece.values)
    for name, whole in wholes.items():
        assert not whole.isnan().any(), f"{name} has elements that no rank holds"
    return wholes


def join_steps(ranks: Sequence[Sequence[StepRecord]]) -> list[Step]:
    """The steps of all ranks as one, after checking that they agree on the losses and the norm."""
    return [_join_step(records) for records in zip(*ranks, strict=True)]


def _join_step(records: Sequence[StepRecord]) -> Step:
    losses = {record.losses for record in records}
    norms = {record.norm for record in records}
    assert len(losses) == 1, f"ranks differ in their losses: {losses}"
    assert len(norms) == 1, f"ranks differ in the gradient norm: {norms}"
    gradients = join(piece for record in records for piece in record.gradients)
    weights = join(piece for record in records for piece in record.weights)
    return Step(losses.pop(), norms.pop(), gradients, weights)


def relative_errors(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """``max|a - b| / max(max|b|, 1e-3 of the largest such value)`` for every tensor."""
    assert found.keys() == truth.keys()
    sizes = {name: tensor.abs().max().item() for name, tensor in truth.items()}
    floor = 1e-3 * max(sizes.values())
    return {
        name: (found[name].to(tensor.dtype) - tensor).abs().max().item() / max(sizes[name], floor)
        for name, tensor in truth.items()
    }


def is_key_bias(name: str) -> bool:
    """Softmax ignores what is added to all scores of a query: the gradient of this bias is rounding noise."""
    return name.endswith("attention.self.key.bias")
