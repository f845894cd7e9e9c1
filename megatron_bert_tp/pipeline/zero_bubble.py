"""Zero-bubble schedules: the weight gradient apart from the input gradient, put where a rank would wait.

Only the input gradient is needed by the stage before.  The weight gradient can come at any later time, and these
orders put it into the gaps that 1F1B leaves at its end.
"""

from collections.abc import Iterable
from typing import TypeAlias

from megatron_bert_tp.pipeline.instructions import Compute, Order, Phase
from megatron_bert_tp.pipeline.placement import Placement

_Kind: TypeAlias = tuple[Phase, int]  # with its chunk

_F0, _F1 = (Phase.FORWARD, 0), (Phase.FORWARD, 1)
_I0, _I1 = (Phase.INPUT_GRADIENT, 0), (Phase.INPUT_GRADIENT, 1)
_W0, _W1 = (Phase.WEIGHT_GRADIENT, 0), (Phase.WEIGHT_GRADIENT, 1)


def zb_h1(placement: Placement, num_microbatches: int) -> tuple[Order, ...]:
    """ZB-H1 (Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.1): 1F1B with weight gradients put off.

    Rank ``r`` puts each off by ``r`` microbatches, so that the later a rank starts, the more it has left for the
    end.  Activations are those of 1F1B, and at most ``r + 1`` weight gradients wait.
    """
    num_ranks = placement.num_ranks
    rows = (_h1(rank, num_ranks=num_ranks, num_microbatches=num_microbatches) for rank in range(num_ranks))
    return tuple(_numbered(row, num_microbatches) for row in rows)


def _h1(rank: int, *, num_ranks: int, num_microbatches: int) -> list[_Kind]:
    num_steady = max(num_microbatches - rank, 0)
    return [
        *[_F0] * (num_ranks - rank - 1),
        *[_F0, _I0] * rank,
        *[_F0, _I0, _W0] * num_steady,
        *[_W0] * rank,
    ]


def zb_v(placement: Placement, num_microbatches: int) -> tuple[Order, ...]:
    """ZB-V (Qi et al. 2024, "Pipeline Parallelism with Controllable Memory"): two chunks in a V.

    Every rank keeps the activations of at most ``2 * num_ranks`` half stages, as the first rank of 1F1B does.  The
    order is made for ``2 * num_ranks - 1`` microbatches or more; with fewer, the rest is left out.
    """
    num_ranks = placement.num_ranks
    num_planned = max(num_microbatches, 2 * num_ranks - 1)
    rows = (_v(rank, num_ranks=num_ranks, num_microbatches=num_planned) for rank in range(num_ranks))
    return tuple(_numbered(row, num_microbatches) for row in rows)


def _v(rank: int, *, num_ranks: int, num_microbatches: int) -> list[_Kind]:
    num_from_here = num_ranks - rank
    return [
        *[_F0] * (2 * num_from_here - 1),
        *[_F1, _F0] * rank,
        *[_F1, _I1, _W1] * num_from_here,
        *[_F0, _I0, _W0, _F1, _I1, _W1] * (num_microbatches - num_ranks),
        *[_I0, _I1] * rank,
        *[_I0, _W0] * num_from_here,
        *[_W1] * rank,
        *[_W0] * rank,
    ]


def _numbered(kinds: Iterable[_Kind], num_microbatches: int) -> Order:
    """Passes of each kind count their microbatches upwards; those beyond the last are left out."""
    order: list[Compute] = []
    counts: dict[_Kind, int] = {}
    for phase, chunk in kinds:
        microbatch = counts.get((phase, chunk), 0)
        counts[phase, chunk] = microbatch + 1
        if microbatch < num_microbatches:
            order.append(Compute(phase, microbatch, chunk))
    return tuple(order)
