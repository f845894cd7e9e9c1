"""The messages that the orders of passes imply, and when each is launched and awaited.

All times here are those of `walk`: every rank does its passes as early as it can, and messages take no time.  A
gap is the place before a pass, or after the last one.  Its `Launch` has the time when the pass before it ends,
its `Await` the time when the pass after it starts.  A rank awaits a message only in a gap whose time is not before
the launch on the other side.  So the instructions of all ranks can be put in one order of time, launches
first, and no program can deadlock, however long passes and messages take in truth.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_bert_tp.errors import ScheduleError
from megatron_bert_tp.pipeline.instructions import (
    Await,
    Instruction,
    Launch,
    Order,
    Phase,
    Program,
    Transfer,
    describe,
    input_transfer,
    output_transfer,
)
from megatron_bert_tp.pipeline.placement import Placement
from megatron_bert_tp.pipeline.walk import UNITS, Walk, walk

# Time of the walk for which a send may be under way: as long as the longest pass.
PATIENCE = max(UNITS.values())
_JOINT = (Phase.FORWARD, Phase.BACKWARD)


@dataclass(frozen=True)
class _Message:
    """One message, the gap after the pass that makes it, and the gap before the pass that needs it."""

    transfer: Transfer
    made: int
    needed: int


@dataclass(frozen=True)
class _Side:
    """When one rank launches and awaits a message, by gap."""

    rank: int
    transfer: Transfer
    launch: int
    await_: int


def programs_of_orders(
    orders: Sequence[Order], placement: Placement, *, overlaps: bool = False
) -> tuple[Program, ...]:
    """Programs of all ranks from their orders; a gap has at most one `Launch` and then one `Await`.

    A send is launched in the gap after the pass that makes it.  By default a receive is launched and awaited in
    the gap before the pass that needs it.  With one stage on each rank and joint backwards, two ranks meet
    in the same gap, and the send is awaited right there.  With several chunks or weight gradients apart they
    do not, and the send is awaited ``PATIENCE`` after both sides have launched, so that a rank does not stand
    still for one that computes longer than the walk says.

    With ``overlaps``, a receive is launched one pass earlier, and every send is awaited as above and at least one
    pass later, so that messages travel while passes run.  Where messages from one rank to another are needed in
    another order than that in which they are sent, receives are launched earlier, so that both sides keep
    one order.

    One rank gets its order back, without messages.  Raises ScheduleError where passes wait for each other.
    """
    if len(orders) != placement.num_ranks:
        raise ScheduleError(f"{len(orders)} orders for {placement.num_ranks} ranks; give one order for each rank")
    walks = walk(orders, placement)
    patience = 0 if _ranks_meet(orders, placement) and not overlaps else PATIENCE
    sides: list[list[_Side]] = [[] for _ in orders]
    for channel in _channels(orders, placement):
        for side in _sides(channel, walks, passes_apart=int(overlaps), patience=patience):
            sides[side.rank].append(side)
    return tuple(tuple(_with_messages(order, own)) for order, own in zip(orders, sides, strict=True))


def _ranks_meet(orders: Sequence[Order], placement: Placement) -> bool:
    """Whether a rank that sends comes to its gap when its neighbour comes to that of the receive."""
    return placement.num_chunks == 1 and all(c.phase in _JOINT for order in orders for c in order)


def _channels(orders: Sequence[Order], placement: Placement) -> Iterable[list[_Message]]:
    """The messages from each rank to each other rank, in the order in which they are made."""
    needed = {
        input_transfer(compute, rank, placement): gap
        for rank, order in enumerate(orders)
        for gap, compute in enumerate(order)
    }
    channels: dict[tuple[int, int], list[_Message]] = {}
    for rank, order in enumerate(orders):
        for gap, compute in enumerate(order, start=1):
            transfer = output_transfer(compute, rank, placement)
            if transfer and transfer not in needed:
                raise ScheduleError(
                    f"rank {rank} makes the {describe(transfer)}, for which that rank has no pass; add it"
                )
            if transfer and not transfer.is_local:
                channel = channels.setdefault((transfer.source, transfer.target), [])
                channel.append(_Message(transfer, gap, needed[transfer]))
    return channels.values()


def _sides(
    channel: Sequence[_Message], walks: Sequence[Walk], *, passes_apart: int, patience: float
) -> Iterator[_Side]:
    """Both sides of each message of a channel; ``passes_apart`` lie between a launch and its await."""
    latest_first = (max(message.needed - passes_apart, 0) for message in reversed(channel))
    receive_gaps = reversed(list(accumulate(latest_first, min)))  # never after that of a later message
    for message, receive in zip(channel, receive_gaps, strict=True):
        transfer = message.transfer
        source, target = walks[transfer.source], walks[transfer.target]
        launched = max(source.launch_time(message.made), target.launch_time(receive))
        awaited = source.first_gap(after=message.made + passes_apart, time=launched + patience)
        yield _Side(transfer.source, transfer, message.made, awaited)
        yield _Side(transfer.target, transfer, receive, message.needed)


def _with_messages(order: Order, sides: Sequence[_Side]) -> Iterator[Instruction]:
    launches: dict[int, list[Transfer]] = {}
    awaits: dict[int, list[Transfer]] = {}
    # The one send of a gap first; receives of one source stay in the order of their channel.
    for side in sorted(sides, key=lambda side: side.transfer.target == side.rank):
        launches.setdefault(side.launch, []).append(side.transfer)
        awaits.setdefault(min(side.await_, len(order)), []).append(side.transfer)
    for gap in range(len(order) + 1):
        if gap in launches:
            yield Launch(tuple(launches[gap]))
        if gap in awaits:
            yield Await(tuple(awaits[gap]))
        yield from order[gap : gap + 1]
