"""All programs come to their end where messages of a communicator wait in a queue, as they do on NCCL."""

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence

import pytest

from megatron_bert_tp.pipeline.instructions import Await, Launch, Program, Transfer
from megatron_bert_tp.pipeline.placement import Placement, v_shaped
from megatron_bert_tp.pipeline.schedule import SCHEDULES, placement_of, programs

Communicator = Callable[[Transfer], Hashable]
PLACED = [
    (name, num_virtual)
    for name, schedule in SCHEDULES.items()
    for num_virtual in ((schedule.num_virtual,) if schedule.num_virtual else (1, 2, 3))
]


def comes_to_an_end(all_programs: Sequence[Program], communicator: Communicator) -> bool:
    """Play the programs: a message moves when both its ranks have it at the head of their queues.

    A rank launches without waiting and stands still at an `Await`, as the stream of a GPU does.
    """
    places = [0] * len(all_programs)
    queues: dict[tuple[int, Hashable], deque[Transfer]] = defaultdict(deque)
    arrived: set[Transfer] = set()
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(all_programs):
            for step in program[places[rank] :]:
                if isinstance(step, Await) and not arrived.issuperset(step.transfers):
                    break
                for transfer in step.transfers if isinstance(step, Launch) else ():
                    queues[rank, communicator(transfer)].append(transfer)
                places[rank], moved = places[rank] + 1, True
        for (_, name), queue in list(queues.items()):
            ends = [queues[end, name] for end in (queue[0].source, queue[0].target)] if queue else []
            if ends and all(other and other[0] == queue[0] for other in ends):
                arrived.add(queue[0])
                moved = True
                for other in ends:
                    other.popleft()
    return places == list(map(len, all_programs))


def by_direction_and_pair(transfer: Transfer) -> Hashable:
    """The channels of `ParallelMesh`."""
    return transfer.source, transfer.target


def by_direction(transfer: Transfer) -> Hashable:
    return transfer.source < transfer.target


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize(("name", "num_virtual"), PLACED)
def test_no_message_waits_for_ever_behind_another(name, num_virtual, overlaps):
    for num_ranks in range(2, 7):
        placement = placement_of(name, num_ranks, num_virtual)
        for number in range(1, 14):
            all_programs = programs(name, placement, number, overlaps=overlaps)
            assert comes_to_an_end(all_programs, by_direction_and_pair), f"{number} on {num_ranks} ranks"


@pytest.mark.parametrize("num_ranks", range(2, 7))
def test_evaluation_in_a_v_comes_to_its_end(num_ranks):
    for number in range(1, 14):
        all_programs = programs("forward_only", v_shaped(num_ranks), number)
        assert comes_to_an_end(all_programs, by_direction_and_pair)


@pytest.mark.parametrize(
    ("name", "placement", "number", "overlaps"),
    [
        ("zb-v", v_shaped(4), 8, False),
        ("interleaved", placement_of("interleaved", 3, 2), 1, True),
        ("forward_only", placement_of("forward_only", 4, 2), 2, True),
    ],
)
def test_one_communicator_for_all_messages_of_a_direction_would_not_do(
    name: str, placement: Placement, number: int, overlaps: bool
):
    assert not comes_to_an_end(programs(name, placement, number, overlaps=overlaps), by_direction)
