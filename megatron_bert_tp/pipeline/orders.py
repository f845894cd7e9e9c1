"""Orders of passes with one stage on each rank: GPipe and 1F1B."""

from itertools import chain

from megatron_bert_tp.pipeline.instructions import Compute, Order, Phase
from megatron_bert_tp.pipeline.placement import Placement


def passes(phase: Phase, num_microbatches: int, *, chunk: int = 0) -> Order:
    """One pass of each microbatch through a chunk, ascending."""
    return tuple(Compute(phase, microbatch, chunk) for microbatch in range(num_microbatches))


def gpipe(placement: Placement, num_microbatches: int) -> tuple[Order, ...]:
    """All forwards, then all backwards (Huang et al. 2019, "GPipe"), both in ascending order.

    Every stage keeps the activations of all microbatches.  Backwards ascend, where the paper's figure
    descends, so that gradients are added in the same order under every schedule.
    """
    order = passes(Phase.FORWARD, num_microbatches) + passes(Phase.BACKWARD, num_microbatches)
    return (order,) * placement.num_ranks


def one_f_one_b(placement: Placement, num_microbatches: int) -> tuple[Order, ...]:
    """Warm-up forwards, then forward and backward in turn, then the backwards that are left.

    Known as PipeDream-flush or 1F1B (Narayanan et al. 2021, section 2.2).  As long as GPipe, but a stage
    keeps the activations of at most ``min(num_ranks - rank, num_microbatches)`` microbatches.
    """
    forwards, backwards = (passes(phase, num_microbatches) for phase in (Phase.FORWARD, Phase.BACKWARD))
    later = reversed(range(placement.num_ranks))  # ranks that come after this one
    return tuple(in_turns(forwards, backwards, num_warmup=count) for count in later)


def in_turns(forwards: Order, backwards: Order, *, num_warmup: int) -> Order:
    """``num_warmup`` forwards, or all there are; then forward and backward in turn; then the backwards left."""
    num_warmup = min(num_warmup, len(forwards))
    turns = chain.from_iterable(zip(forwards[num_warmup:], backwards, strict=False))
    return (*forwards[:num_warmup], *turns, *backwards[len(forwards) - num_warmup :])
