"""Interleaved 1F1B: several virtual stages on each rank, so that the bubble shrinks by their number."""

from itertools import pairwise

from megatron_bert_tp.pipeline.instructions import Compute, Order, Phase
from megatron_bert_tp.pipeline.orders import in_turns
from megatron_bert_tp.pipeline.placement import Placement


def interleaved(placement: Placement, num_microbatches: int) -> tuple[Order, ...]:
    """1F1B over virtual stages (Narayanan et al. 2021, section 2.2), for any number of microbatches.

    Groups of microbatches take one chunk after the other.  With microbatches a multiple of the ranks this
    is Megatron-LM's order: groups of ``num_ranks``, and two more warm-up forwards for each rank that comes
    after.  One chunk on each rank gives plain 1F1B.
    """
    num_ranks, num_chunks = placement.num_ranks, placement.num_chunks
    runs = groups(num_microbatches, num_ranks)
    forwards = rounds(Phase.FORWARD, range(num_chunks), runs)
    backwards = rounds(Phase.BACKWARD, range(num_chunks)[::-1], runs)
    num_first_rounds = (num_chunks - 1) * len(runs[0])
    per_rank = min(num_chunks, 2)
    return tuple(
        in_turns(forwards, backwards, num_warmup=num_first_rounds + per_rank * later)
        for later in reversed(range(num_ranks))
    )


def groups(num_microbatches: int, num_ranks: int) -> list[range]:
    """Microbatches cut into groups of ``num_ranks`` or a little more; one group where there are fewer.

    A smaller group would come around the ranks and find nothing ready: one group of 1 after one of 4 costs four
    ranks with two chunks 9 of 39 units.  The first groups take the remainder.
    """
    num_groups = max(1, num_microbatches // num_ranks)
    share, extra = divmod(num_microbatches, num_groups)
    starts = (index * share + min(index, extra) for index in range(num_groups + 1))
    return [range(start, end) for start, end in pairwise(starts)]


def rounds(phase: Phase, chunks: range, microbatch_groups: list[range]) -> Order:
    """Each group of microbatches through one chunk after the other."""
    return tuple(
        Compute(phase, microbatch, chunk)
        for group in microbatch_groups
        for chunk in chunks
        for microbatch in group
    )
