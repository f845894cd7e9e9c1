"""Each parallel layer against the dense layer of torch: forward and all gradients, float64, tensor 1, 2, 4."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bert_tp.errors import LayoutError
from megatron_bert_tp.model.heads import MaskedLanguageModelHead
from megatron_bert_tp.parallel.embedding import VocabParallelEmbedding
from megatron_bert_tp.parallel.linear import (
    ColumnParallelLinear,
    QueryKeyValueLinear,
    RowParallelLinear,
    VocabParallelProjection,
)
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.sharding import parts
from tests.comparison import Piece, gradient_pieces, join
from tests.support import ODD_SHAPE, Layout, build_mesh

FLOAT64 = torch.float64
VOCABULARY = 1003
# Sums of up to 1003 products of numbers near 1, in another order: some 1e-14.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=FLOAT64, generator=torch.Generator().manual_seed(seed))


def words() -> Tensor:
    """Ids with repeats, [PAD], both sides of every border between ranks, and the last word."""
    ids = torch.randint(0, VOCABULARY, (3, 15), generator=torch.Generator().manual_seed(1))
    ids[0] = torch.tensor([0, 0, 255, 256, 257, 503, 504, 511, 512, 767, 768, 1002, 1002, 7, 7])
    return ids


@dataclass(frozen=True)
class Case:
    """A layer, how its input and output lie on the ranks, and the dense truth."""

    build: Callable[[Axis], nn.Module]
    x: Tensor
    dense: Callable[..., Tensor]
    out_features: int
    splits_input: bool = False
    splits_output: bool = False
    num_blocks: int = 1


CASES = {
    "column": Case(
        build=lambda axis: ColumnParallelLinear(6, 12, axis=axis, dtype=FLOAT64),
        x=draw(3, 5, 6, seed=2),
        dense=lambda x, w: F.linear(x, w["weight"], w["bias"]),
        out_features=12,
        splits_output=True,
    ),
    "qkv": Case(
        build=lambda axis: nn.ModuleDict({"fused": QueryKeyValueLinear(6, 8, axis=axis, dtype=FLOAT64)}),
        x=draw(3, 5, 6, seed=3),
        dense=lambda x, w: torch.cat(
            [F.linear(x, w[f"{block}.weight"], w[f"{block}.bias"]) for block in ("query", "key", "value")], -1
        ),
        out_features=24,
        splits_output=True,
        num_blocks=3,
    ),
    "row": Case(
        build=lambda axis: RowParallelLinear(12, 6, axis=axis, dtype=FLOAT64),
        x=draw(3, 5, 12, seed=4),
        dense=lambda x, w: F.linear(x, w["weight"], w["bias"]),
        out_features=6,
        splits_input=True,
    ),
    "embedding": Case(
        build=lambda axis: VocabParallelEmbedding(VOCABULARY, 4, axis=axis, dtype=FLOAT64, padding_idx=0),
        x=words(),
        dense=lambda x, w: F.embedding(x, w["weight"], padding_idx=0),
        out_features=4,
    ),
    "embedding with a padding row on another rank": Case(
        build=lambda axis: VocabParallelEmbedding(VOCABULARY, 4, axis=axis, dtype=FLOAT64, padding_idx=1002),
        x=words(),
        dense=lambda x, w: F.embedding(x, w["weight"], padding_idx=1002),
        out_features=4,
    ),
    "projection": Case(
        build=lambda axis: VocabParallelProjection(6, VOCABULARY, axis=axis, dtype=FLOAT64),
        x=draw(7, 6, seed=5),
        dense=lambda x, w: F.linear(x, w["weight"]),
        out_features=VOCABULARY,
        splits_output=True,
    ),
}


def cut(whole: Tensor, axis: Axis, share: int) -> Tensor:
    """Columns of this rank; those past the end of the whole are zero."""
    padded = F.pad(whole, (0, share * axis.size - whole.shape[-1]))
    return padded[..., axis.rank * share : (axis.rank + 1) * share]


def output_shape(case: Case) -> tuple[int, ...]:
    leading = case.x.shape if not case.x.is_floating_point() else case.x.shape[:-1]
    return (*leading, case.out_features)


def weights_of(case: Case) -> dict[str, Tensor]:
    """Whole random tensors by name, the same on all ranks and in the dense layer."""
    named = parts(case.build(Axis.alone("tensor")), Axis.alone("tensor"))
    return {part.name: draw(*part.shape, seed=10 + number) for number, part in enumerate(named)}


def run_case(case: Case, axis: Axis) -> tuple[Tensor, Tensor | None, list[Piece]]:
    """This rank's output, gradient of the input, and gradients of the parameters."""
    layer = case.build(axis)
    weights = weights_of(case)
    with torch.no_grad():
        for part in parts(layer, axis):
            part.view(part.parameter).copy_(part.cut(weights[part.name]))
    x = cut(case.x, axis, case.x.shape[-1] // axis.size) if case.splits_input else case.x
    x = x.clone().requires_grad_(x.is_floating_point())
    output = call(layer, x)
    blocks = [draw(*output_shape(case), seed=6)]
    if case.splits_output:
        share = output.shape[-1] // case.num_blocks
        blocks = [cut(block, axis, share) for block in blocks[0].chunk(case.num_blocks, -1)]
    output.backward(torch.cat(blocks, -1))
    return output.detach(), x.grad, gradient_pieces(parts(layer, axis))


def call(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, VocabParallelProjection):
        return layer(x, torch.zeros(layer.weight.shape[0], dtype=FLOAT64))
    return layer["fused"](x) if isinstance(layer, nn.ModuleDict) else layer(x)


def run_cases(size: int) -> dict[str, tuple[Tensor, Tensor | None, list[Piece]]]:
    axis = build_mesh(Layout(tensor=size)).tensor
    return {name: run_case(case, axis) for name, case in CASES.items()}


def dense_results(case: Case) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    weights = {name: weight.requires_grad_() for name, weight in weights_of(case).items()}
    x = case.x.clone().requires_grad_(case.x.is_floating_point())
    output = case.dense(x, weights)
    output.backward(draw(*output_shape(case), seed=6))
    return output.detach(), x.grad, {name: weight.grad for name, weight in weights.items()}


def joined_output(case: Case, outputs: list[Tensor]) -> Tensor:
    if not case.splits_output:
        assert all(torch.equal(output, outputs[0]) for output in outputs), "ranks differ"
        return outputs[0]
    blocks = zip(*(output.chunk(case.num_blocks, -1) for output in outputs), strict=True)
    size = case.out_features // case.num_blocks
    return torch.cat([torch.cat(block, -1)[..., :size] for block in blocks], -1)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_layers_equal_dense_layers(ranks, size):
    answers = ranks.run(size, run_cases, size)
    for name, case in CASES.items():
        outputs, grads, pieces = zip(*(answer[name] for answer in answers), strict=True)
        output, grad, grad_weights = dense_results(case)
        torch.testing.assert_close(joined_output(case, list(outputs)), output, **EXACT)
        if grad is not None:
            found = torch.cat(grads, -1) if case.splits_input else grads[0]
            torch.testing.assert_close(found, grad, **EXACT)
        found_weights = join(piece for of_rank in pieces for piece in of_rank)
        torch.testing.assert_close(found_weights, grad_weights, **EXACT)


def test_features_that_do_not_divide_are_refused():
    pair = Axis("tensor", (0, 1), 1)
    for build in (
        lambda: ColumnParallelLinear(4, 37, axis=pair, dtype=FLOAT64),
        lambda: RowParallelLinear(37, 4, axis=pair, dtype=FLOAT64),
        lambda: QueryKeyValueLinear(4, 37, axis=pair, dtype=FLOAT64),
    ):
        with pytest.raises(LayoutError, match=r"\(37\) must be a multiple of the tensor size \(2\)"):
            build()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_vocabulary_rows_of_all_ranks_are_the_vocabulary(size):
    for build in (
        lambda axis: VocabParallelEmbedding(VOCABULARY, 4, axis=axis, dtype=FLOAT64),
        lambda axis: MaskedLanguageModelHead(ODD_SHAPE, axis=axis, dtype=FLOAT64),
    ):
        rows: dict[str, list[int]] = {}
        for rank in range(size):
            axis = Axis("tensor", tuple(range(size)), rank)
            for part in parts(build(axis), axis):
                if part.shape[0] == VOCABULARY:
                    first = part.offsets[0]
                    rows.setdefault(part.name, []).extend(range(first, first + part.local_shape[0]))
        assert rows
        assert all(found == list(range(VOCABULARY)) for found in rows.values())
