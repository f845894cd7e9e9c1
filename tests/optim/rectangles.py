"""Whole tensors cut into owned rectangles, as tensor ranks and owners hold them, and joined again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_bert_tp.optim.rules import OptimizerNumbers, build_optimizer, step_
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.ownership import Owned
from megatron_bert_tp.parallel.sharding import Part
from tests.comparison import Piece

ALONE = Axis.alone("tensor")
LOOKUP, PROJECTION = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"


@dataclass(frozen=True)
class Whole:
    """One tensor of a model: its shape, the dim that tensor ranks split, and of what it is a copy."""

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    alias_of: str | None = None


# Two rows over four owners: some have none.  And a copy of the lookup as another stage holds it.
WHOLES = (
    Whole(LOOKUP, (18, 5), dim=0),
    Whole("a.dense.weight", (4, 10), dim=1),
    Whole("a.dense.bias", (4,)),
    Whole("a.ln.weight", (5,)),
    Whole("pooler.dense.weight", (7, 3)),
    Whole("query.weight", (8, 5), dim=0),
    Whole("query.bias", (8,), dim=0),
    Whole("zero.weight", (2, 6), dim=0),
    Whole(PROJECTION, (18, 5), dim=0, alias_of=LOOKUP),
)


def values(whole: Whole, salt: int) -> Tensor:
    """Numbers that depend on the tensor's source and ``salt``, another size for every name."""
    source = whole.alias_of or whole.name
    generator = torch.Generator().manual_seed(sum(map(ord, source)) + 1000 * salt)
    return (1 + len(source) % 5) * torch.randn(whole.shape, dtype=torch.float64, generator=generator)


def weights_at_start() -> dict[str, Tensor]:
    """All tensors; one of them is zero, so that its first step has no norm to divide."""
    return {
        whole.name: values(whole, 0) * (0.0 if whole.name == "zero.weight" else 1.0) for whole in WHOLES
    }


def gradients_of(step: int) -> dict[str, Tensor]:
    """Gradients of one step; that of the pooler is zero at first, so that its update is its decay alone."""
    is_silent = {"pooler.dense.weight": step == 0}
    return {
        whole.name: values(whole, step + 1) * (0.0 if is_silent.get(whole.name) else 1.0) for whole in WHOLES
    }


def part_of(whole: Whole, axis: Axis = ALONE) -> Part:
    """This tensor rank's rectangle."""
    dim = whole.dim if axis.size > 1 else None
    sizes = tuple(size // axis.size if at == dim else size for at, size in enumerate(whole.shape))
    offsets = tuple(axis.rank * size if at == dim else 0 for at, size in enumerate(sizes))
    parameter = nn.Parameter(torch.zeros(sizes, dtype=torch.float64))
    return Part(
        whole.name,
        parameter,
        whole.shape,
        offsets,
        sizes,
        dim=whole.dim,
        row=0,
        most_rows=sizes[0],
        axis=axis,
        alias_of=whole.alias_of,
    )


def owned_of(
    wholes: Sequence[Whole], *, axis: Axis = ALONE, owners: Axis = ALONE, dtype: torch.dtype = torch.float64
) -> list[Owned]:
    """Rectangles of one rank, with the weights of the start and no gradients yet."""
    start = weights_at_start()
    found = []
    for whole in wholes:
        part = part_of(whole, axis).owned_by(owners.rank, owners.size)
        weight = part.cut(start[whole.name]).to(dtype, copy=True)
        found.append(Owned(part, weight, torch.zeros_like(weight)))
    return found


def walk(
    owned: Sequence[Owned],
    optimizer: torch.optim.Optimizer,
    rates: Sequence[float],
    *,
    decays: Sequence[float],
    first: int = 0,
) -> None:
    """Steps from ``first`` on, with the gradients of each."""
    for step, (rate, decay) in enumerate(zip(rates, decays, strict=True), start=first):
        gradients = gradients_of(step)
        for each in owned:
            each.gradient.copy_(each.part.cut(gradients[each.part.name]))
        step_(optimizer, rate=rate, weight_decay=decay)


def built(owned: Sequence[Owned], numbers: OptimizerNumbers) -> torch.optim.Optimizer:
    """Optimizer of a rank that has nobody to add with."""
    return build_optimizer(owned, numbers, sum_over_owners=lambda vector: vector)


def pieces(owned: Sequence[Owned]) -> list[Piece]:
    """Rectangles under their own names, for `tests.comparison.join`."""
    return [Piece(each.part.name, each.part.shape, each.part.offsets, each.weight.clone()) for each in owned]


def assert_near(found: Mapping[str, Tensor], truth: Mapping[str, Tensor], tolerance: float) -> None:
    """Every tensor within ``tolerance`` of the truth, relative to its largest element."""
    assert found.keys() == truth.keys()
    for name, whole in found.items():
        error = (whole - truth[name]).abs().max() / truth[name].abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"
