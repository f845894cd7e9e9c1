"""The cut into stages against brute force over all cuts."""

from collections.abc import Iterator

import pytest

from megatron_bert_tp.errors import LayoutError
from megatron_bert_tp.pipeline.partition import StagePlan, partition, stage_costs

COSTS = [(0.0, 0.0), (0.0, 0.35), (0.0, 1.0), (0.3, 2.26), (1.5, 0.5), (4.0, 3.0), (0.5, 0.5)]


def cuts(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    """All ways to give at least one layer to every stage."""
    if num_stages == 1:
        yield (num_layers,)
        return
    for first in range(1, num_layers - num_stages + 2):
        for rest in cuts(num_layers - first, num_stages - 1):
            yield (first, *rest)


def costs(counts: tuple[int, ...], embedding: float, head: float) -> list[float]:
    extra = [0.0] * len(counts)
    extra[0] += embedding
    extra[-1] += head
    return [count + more for count, more in zip(counts, extra, strict=True)]


def best(num_layers: int, num_stages: int, embedding: float, head: float) -> tuple[int, ...]:
    """By brute force: cheapest dearest stage, then the second dearest, ...; then most layers early."""

    def rank(counts: tuple[int, ...]) -> tuple[list[float], list[int]]:
        return sorted(costs(counts, embedding, head), reverse=True), [-count for count in counts]

    return min(cuts(num_layers, num_stages), key=rank)


def counts_of(plans: tuple[StagePlan, ...]) -> tuple[int, ...]:
    return tuple(len(plan.layers) for plan in plans)


@pytest.mark.parametrize(("embedding", "head"), COSTS)
def test_cut_is_the_best_of_all_cuts(embedding: float, head: float) -> None:
    for num_layers in range(1, 12):
        for num_stages in range(1, min(num_layers, 5) + 1):
            plans = partition(num_layers, num_stages, embedding_cost=embedding, head_cost=head)
            assert counts_of(plans) == best(num_layers, num_stages, embedding, head)


@pytest.mark.parametrize(("num_layers", "num_stages"), [(24, 8), (5, 2), (7, 7), (13, 4), (3, 1)])
def test_without_costs_the_first_stages_take_the_remainder(num_layers: int, num_stages: int) -> None:
    share, extra = divmod(num_layers, num_stages)
    expected = tuple(share + (stage < extra) for stage in range(num_stages))
    assert counts_of(partition(num_layers, num_stages)) == expected


@pytest.mark.parametrize(("embedding", "head"), COSTS)
def test_stages_are_contiguous_and_cover_every_layer_once(embedding: float, head: float) -> None:
    plans = partition(24, 5, embedding_cost=embedding, head_cost=head)
    assert [layer for plan in plans for layer in plan.layers] == list(range(24))
    assert [plan.is_first for plan in plans] == [True, False, False, False, False]
    assert [plan.is_last for plan in plans] == [False, False, False, False, True]


def test_one_stage_is_first_and_last() -> None:
    assert partition(4, 1, head_cost=9.0) == (StagePlan(is_first=True, is_last=True, layers=range(4)),)


def test_full_head_moves_layers_off_the_last_stage() -> None:
    assert counts_of(partition(24, 8, head_cost=2.26)) == (4, 4, 3, 3, 3, 3, 3, 1)


@pytest.mark.parametrize("num_stages", [0, 5])
def test_more_stages_than_layers_or_none_are_refused_with_the_way_out(num_stages: int) -> None:
    with pytest.raises(LayoutError, match=rf"x parallel.virtual \({num_stages}\).*use at most 4 stages"):
        partition(4, num_stages)


@pytest.mark.parametrize(
    ("hidden", "share", "layers"),
    [(1024, 1.0, 2.26), (2048, 1.0, 1.22), (2560, 1.0, 1.0), (1024, 80 / 512, 0.35), (2048, 80 / 512, 0.19)],
)
def test_head_costs_equal_the_published_shapes(hidden: int, share: float, layers: float) -> None:
    cost = stage_costs(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        vocab_size=29056,
        sequence_length=512,
        predicted_share=share,
    )
    assert round(cost.head, 2) == layers  # the table gives two decimals
    assert cost.embedding == 0


def test_narrow_mlp_makes_the_head_weigh_more() -> None:
    sizes = {"hidden_size": 64, "vocab_size": 1000, "sequence_length": 32}
    wide, narrow = (stage_costs(**sizes, intermediate_size=i, predicted_share=0.15).head for i in (256, 64))
    # Per position and feature: 8 h + 4 i + 4 s multiplications and additions.
    assert narrow / wide == pytest.approx((512 + 1024 + 128) / (512 + 256 + 128), rel=1e-12)
