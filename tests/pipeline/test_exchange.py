"""Messages of orders that nobody planned: any order that can run at all gets programs that run."""

from random import Random

import pytest

from megatron_bert_tp.pipeline.placement import Placement, looping, straight, v_shaped
from megatron_bert_tp.pipeline.schedule import (
    Compute,
    Order,
    Phase,
    Transfer,
    input_transfer,
    output_transfer,
    programs_of_orders,
)
from megatron_bert_tp.pipeline.simulate import Durations, simulate

F, B, I, W = Phase  # noqa: E741
AFTER = {F: None, B: F, I: F, W: I}


def drawn_orders(draw: Random, placement: Placement, num_microbatches: int) -> tuple[Order, ...]:
    """Orders drawn pass by pass among all whose input is there; microbatches need not ascend."""
    orders: list[list[Compute]] = [[] for _ in range(placement.num_ranks)]
    left = [
        (rank, Compute(phase, microbatch, chunk))
        for microbatch in range(num_microbatches)
        for rank in range(placement.num_ranks)
        for chunk in range(placement.num_chunks)
        for phase in draw.choice([(F, B), (F, I, W)])
    ]
    made: set[Transfer | None] = {None}
    while left:
        ready = [
            (rank, compute) for rank, compute in left
            if input_transfer(compute, rank, placement) in made and _is_next(compute, orders[rank])
        ]  # fmt: skip
        rank, compute = draw.choice(ready)
        left.remove((rank, compute))
        orders[rank].append(compute)
        made.add(output_transfer(compute, rank, placement))
    return tuple(map(tuple, orders))


def _is_next(compute: Compute, order: list[Compute]) -> bool:
    before = AFTER[compute.phase]
    return before is None or Compute(before, compute.microbatch, compute.chunk) in order


@pytest.mark.parametrize(
    "placement", [straight(2), straight(5), looping(2, 3), looping(4, 2), v_shaped(2), v_shaped(4)]
)
@pytest.mark.parametrize("overlaps", [False, True])
def test_every_order_that_can_run_has_programs_that_run(placement, overlaps):
    draw = Random(3)
    for _ in range(25):
        orders = drawn_orders(draw, placement, draw.randint(1, 6))
        times = [tuple(draw.uniform(0.1, 5) for _ in range(placement.num_stages)) for _ in range(2)]
        durations = Durations(*times, transfer=draw.choice([0, 0.5, 10]))
        found = simulate(programs_of_orders(orders, placement, overlaps=overlaps), placement, durations)
        assert tuple(tuple(interval.compute for interval in row) for row in found.ranks) == orders
