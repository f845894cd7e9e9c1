"""Pipeline schedules by name: which rank computes what in which order, and the messages that this implies.

A schedule is a pure function that gives the orders of all ranks.  `programs_of_orders` turns orders into
programs, and those very programs are run by the executor, checked by `simulate` and drawn by `timeline`.
Nothing here imports torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

from megatron_bert_tp.errors import ScheduleError
from megatron_bert_tp.pipeline.exchange import programs_of_orders
from megatron_bert_tp.pipeline.forward_only import forward_only
from megatron_bert_tp.pipeline.instructions import (
    Await,
    Compute,
    Instruction,
    Launch,
    Order,
    Phase,
    Program,
    Transfer,
    input_transfer,
    output_transfer,
)
from megatron_bert_tp.pipeline.interleaved import interleaved
from megatron_bert_tp.pipeline.orders import gpipe, one_f_one_b
from megatron_bert_tp.pipeline.placement import Placement, looping, v_shaped
from megatron_bert_tp.pipeline.zero_bubble import zb_h1, zb_v

__all__ = [
    "SCHEDULES",
    "Await",
    "Compute",
    "Instruction",
    "Launch",
    "Order",
    "Phase",
    "Program",
    "Schedule",
    "Transfer",
    "input_transfer",
    "orders_of",
    "output_transfer",
    "placement_of",
    "programs",
    "programs_of_orders",
]


@dataclass(frozen=True)
class Schedule:
    """How a schedule orders passes, and on which placements it does.

    ``num_virtual`` is the one number of virtual stages on a rank that it takes, or None for any.
    """

    orders: Callable[[Placement, int], tuple[Order, ...]]
    num_virtual: int | None = 1
    is_v_shaped: bool = False
    takes_any_placement: bool = False

    def place(self, num_ranks: int, num_virtual: int) -> Placement:
        """The placement that this schedule is made for."""
        return v_shaped(num_ranks) if self.is_v_shaped else looping(num_ranks, num_virtual)


SCHEDULES = MappingProxyType(
    {
        "gpipe": Schedule(gpipe),
        "1f1b": Schedule(one_f_one_b),
        "interleaved": Schedule(interleaved, num_virtual=None),
        "zb-h1": Schedule(zb_h1),
        "zb-v": Schedule(zb_v, num_virtual=2, is_v_shaped=True),
        "forward_only": Schedule(forward_only, num_virtual=None, takes_any_placement=True),
    }
)


def _schedule(name: str) -> Schedule:
    if name not in SCHEDULES:
        raise ScheduleError(f"unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def placement_of(name: str, num_ranks: int, num_virtual: int) -> Placement:
    """Where the schedule ``name`` of `SCHEDULES` puts its ``num_virtual`` virtual stages on each rank.

    Raises ScheduleError for an unknown name, for a number of virtual stages that the schedule does not
    take, and for less than one rank or virtual stage.
    """
    schedule = _schedule(name)
    if schedule.num_virtual not in (None, num_virtual):
        others = [other for other, each in SCHEDULES.items() if each.num_virtual in (None, num_virtual)]
        raise ScheduleError(
            f"schedule {name} puts {schedule.num_virtual} virtual stages on a rank, not {num_virtual}; use "
            f"{schedule.num_virtual}, or a schedule that takes {num_virtual}: {', '.join(others)}"
        )
    return schedule.place(num_ranks, num_virtual)


def programs(
    name: str, placement: Placement, num_microbatches: int, *, overlaps: bool = False
) -> tuple[Program, ...]:
    """Programs of all ranks, messages included, for the schedule ``name`` of `SCHEDULES`.

    ``overlaps`` as in `programs_of_orders`.  Raises ScheduleError for an unknown name, for fewer than one
    microbatch and for a placement that is not that of the schedule; ``forward_only`` takes every one.
    """
    return programs_of_orders(orders_of(name, placement, num_microbatches), placement, overlaps=overlaps)


def orders_of(name: str, placement: Placement, num_microbatches: int) -> tuple[Order, ...]:
    """Orders of all ranks, without messages; errors as in `programs`."""
    schedule = _schedule(name)
    if num_microbatches < 1:
        raise ScheduleError(f"a pipeline needs at least one microbatch, got {num_microbatches}; use 1 or more")
    if not schedule.takes_any_placement:
        expected = placement_of(name, placement.num_ranks, placement.num_chunks)
        if placement != expected:
            raise ScheduleError(
                f"schedule {name} places its stages as {expected.stages}, not as {placement.stages}; "
                f"use placement_of({name!r}, {placement.num_ranks}, {placement.num_chunks})"
            )
    return schedule.orders(placement, num_microbatches)
