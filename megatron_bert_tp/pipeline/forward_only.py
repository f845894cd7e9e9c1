"""Forwards alone, for evaluation and prediction, under every placement."""

from megatron_bert_tp.pipeline.instructions import Order, Phase
from megatron_bert_tp.pipeline.interleaved import groups, rounds
from megatron_bert_tp.pipeline.orders import in_turns, passes
from megatron_bert_tp.pipeline.placement import Placement, v_shaped


def forward_only(placement: Placement, num_microbatches: int) -> tuple[Order, ...]:
    """Every microbatch through each chunk, in an order that leaves no rank waiting but at the ends.

    Over a straight line or a loop, groups of microbatches take one chunk after the other as in `interleaved`, so
    that a group more, not all microbatches, waits between two chunks.  In a V the two chunks take turns:
    a rank does them as fast as the last rank, which does both of a microbatch at once.
    """
    num_ranks = placement.num_ranks
    if placement == v_shaped(num_ranks):
        down, up = (passes(Phase.FORWARD, num_microbatches, chunk=chunk) for chunk in (0, 1))
        return tuple(in_turns(down, up, num_warmup=num_ranks - rank - 1) for rank in range(num_ranks))
    order = rounds(Phase.FORWARD, range(placement.num_chunks), groups(num_microbatches, num_ranks))
    return (order,) * num_ranks
