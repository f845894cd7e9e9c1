"""The simulation against hand-computed times, and planted faults that it has to report."""

import pytest

from megatron_bert_tp.errors import ScheduleError
from megatron_bert_tp.pipeline.placement import looping, straight, v_shaped
from megatron_bert_tp.pipeline.schedule import (
    Await,
    Compute,
    Instruction,
    Launch,
    Phase,
    Program,
    Transfer,
    placement_of,
    programs,
    programs_of_orders,
)
from megatron_bert_tp.pipeline.simulate import Durations, Interval, Timeline, simulate

F0, B0, I0, W0 = (Compute(phase, 0) for phase in Phase)


def timeline(name: str, num_ranks: int, num_microbatches: int) -> Timeline:
    return run(list(programs(name, straight(num_ranks), num_microbatches)))


def run(ranks: list[Program]) -> Timeline:
    """Simulate one stage on each rank, with backwards twice as long as forwards."""
    return simulate(ranks, straight(len(ranks)), Durations.equal(len(ranks), forward=1, backward=2))


def one_by_one(program: Program) -> Program:
    """The same program with every message launched and awaited alone."""
    steps: list[Instruction] = []
    for instruction in program:
        if isinstance(instruction, Compute):
            steps.append(instruction)
        elif isinstance(instruction, Launch):
            for transfer in instruction.transfers:
                steps += [Launch((transfer,)), Await((transfer,))]
    return tuple(steps)


def without(kind: type[Launch] | type[Await], program: Program) -> Program:
    """The program without its first instruction of this kind."""
    place = next(place for place, instruction in enumerate(program) if isinstance(instruction, kind))
    return program[:place] + program[place + 1 :]


def test_two_stages_and_two_microbatches_run_at_the_hand_computed_times() -> None:
    passes = [Compute(phase, m) for m in range(2) for phase in (Phase.FORWARD, Phase.BACKWARD)]
    f0, b0, f1, b1 = passes
    first = (Interval(0, 1, f0), Interval(1, 2, f1), Interval(4, 6, b0), Interval(7, 9, b1))
    last = (Interval(1, 2, f0), Interval(2, 4, b0), Interval(4, 5, f1), Interval(5, 7, b1))
    assert timeline("1f1b", 2, 2).ranks == (first, last)


def test_messages_delay_the_next_stage_by_their_time() -> None:
    durations = Durations.equal(3, forward=1, backward=2, transfer=0.5)
    assert simulate(programs("1f1b", straight(3), 1), straight(3), durations).length == 3 * (1 + 2) + 4 * 0.5


def test_pass_between_launch_and_await_hides_the_message() -> None:
    f1 = Compute(Phase.FORWARD, 1)
    send = tuple(Transfer(Phase.FORWARD, m, 0, source=0, target=1) for m in range(2))
    overlapped = (F0, Launch(send[:1]), f1, Launch(send[1:]), Await(send))
    eager = (Launch(send[:1]), Launch(send[1:]), Await(send[:1]), F0, Await(send[1:]), f1)
    line = simulate([overlapped, eager], straight(2), Durations((1, 4), (1, 1), transfer=0.5))
    assert line.ranks[0] == (Interval(0, 1, F0), Interval(1, 2, f1))
    assert line.ranks[1] == (Interval(1.5, 5.5, F0), Interval(5.5, 9.5, f1))


def test_slow_stage_sets_the_pace() -> None:
    durations = Durations(forward=(1, 5, 1), backward=(1, 5, 1))
    length = simulate(programs("gpipe", straight(3), 10), straight(3), durations).length
    assert length == 1 + 10 * 5 + 1 + 1 + 10 * 5 + 1


def test_messages_sent_one_by_one_deadlock_and_every_stuck_rank_is_named() -> None:
    with pytest.raises(ScheduleError) as caught:
        run([one_by_one(program) for program in programs("1f1b", straight(2), 4)])
    assert str(caught.value).splitlines() == [
        "deadlock: these ranks wait for each other for ever; "
        "launch the messages of one gap together, sends and receives",
        "  rank 0, instruction 5 of 24: Await of hidden states of microbatch 1 from rank 0 to rank 1, "
        "which rank 1 has not launched",
        "  rank 1, instruction 5 of 24: Await of gradient of microbatch 0 from rank 1 to rank 0, "
        "which rank 0 has not launched",
    ]


def test_receives_in_another_order_than_the_sends_are_reported():
    first, second = programs("forward_only", straight(2), 2)
    swapped = (*second[3:5], *second[:2], second[2], second[5])
    message = (
        "message 0 from rank 0 to rank 1 does not match: rank 0 sends hidden states of microbatch 0 .*, "
        "rank 1 receives hidden states of microbatch 1"
    )
    with pytest.raises(ScheduleError, match=message):
        run([first, swapped])


def test_send_that_nobody_receives_is_reported() -> None:
    first, _ = programs("forward_only", straight(2), 1)
    with pytest.raises(ScheduleError, match=r"sends hidden states .*, rank 1 receives nothing"):
        run([first, ()])


def test_receive_that_nobody_sends_is_reported() -> None:
    _, second = programs("forward_only", straight(2), 1)
    with pytest.raises(ScheduleError, match="rank 0 sends nothing, rank 1 receives hidden states"):
        run([(F0,), second])


FIRST, LAST = programs("forward_only", straight(2), 1)
ACTIVATION = Transfer(Phase.FORWARD, 0, 0, source=0, target=1)
SEND, SENT = Launch((ACTIVATION,)), Await((ACTIVATION,))


@pytest.mark.parametrize(
    ("faulty", "rule"),
    [
        ([FIRST, without(Await, LAST)], "rank 1 starts the forward of microbatch 0 before it awaits"),
        ([without(Await, FIRST), LAST], "rank 0 never awaits hidden states"),
        ([without(Launch, FIRST), LAST], "rank 0 awaits hidden states .* before its launch"),
        ([(SEND, SENT, F0), LAST], "rank 0 sends hidden states .* before it is computed"),
        ([(F0, SEND, SENT, SEND), LAST], "rank 0 launches hidden states .* twice"),
        ([(F0, SEND, SENT, SENT), LAST], "rank 0 awaits hidden states .* twice"),
        ([FIRST, LAST, (SEND, SENT)], "rank 2 launches .*, which is not its own"),
        ([(F0, SEND, SENT)], "rank 0 launches .*, but the ranks are 0 to 0"),
        ([(B0, F0)], "rank 0 starts the backward of microbatch 0 before its forward"),
    ],
)
def test_rule_that_a_program_breaks_is_named(faulty: list[Program], rule: str) -> None:
    with pytest.raises(ScheduleError, match=rule):
        run(faulty)


SPLIT = (F0, I0, W0)


@pytest.mark.parametrize(
    ("program", "rule"),
    [
        ((F0, W0, I0), "rank 0 starts the weight gradient of microbatch 0 before its input gradient"),
        ((F0, I0), "rank 0 has no weight gradient of microbatch 0"),
        ((*SPLIT, W0), "rank 0 starts the weight gradient of microbatch 0 twice"),
        ((*SPLIT, B0), "rank 0 starts the backward of microbatch 0 after its input gradient; have one of them"),
        (
            (F0, B0, I0, W0),
            "rank 0 starts the input gradient of microbatch 0 after its backward; have one of them",
        ),
        ((F0, F0), "rank 0 starts the forward of microbatch 0 twice"),
        ((Compute(Phase.FORWARD, 0, 1),), r"rank 0 starts the forward of microbatch 0 \(chunk 1\), .* are 0 to 0"),
        ((W0,), "before its input gradient"),
    ],
)
def test_rule_of_the_passes_is_named(program, rule):
    with pytest.raises(ScheduleError, match=rule):
        run([program])


def test_what_a_rank_hands_to_itself_needs_no_message_but_has_to_be_made():
    up = Compute(Phase.FORWARD, 0, 1)
    durations = Durations.equal(2, forward=1, backward=2, transfer=5)
    assert simulate([(F0, up)], looping(1, 2), durations).length == 2
    with pytest.raises(
        ScheduleError, match=r"rank 0 starts the forward .* \(chunk 1\) before it has made the hidden"
    ):
        simulate([(up, F0)], looping(1, 2), durations)
    local = Transfer(Phase.FORWARD, 0, 1, source=0, target=0)
    with pytest.raises(ScheduleError, match=r"rank 0 launches hidden states .*, which needs no message"):
        simulate([(F0, Launch((local,)), Await((local,)), up)], looping(1, 2), durations)


def test_every_virtual_stage_has_times_of_its_own():
    """Rank 0 of a V holds stages 0 and 3, rank 1 stages 1 and 2."""
    durations = Durations(forward=(1, 2, 4, 8), backward=(16, 32, 64, 128), weight=(1, 2, 3, 4))
    line = simulate(programs("zb-v", v_shaped(2), 1), v_shaped(2), durations)
    assert [[interval.end - interval.start for interval in row] for row in line.ranks] == [
        [1, 8, 124, 4, 15, 1],  # F0.0 F0.1 I0.1 W0.1 I0.0 W0.0
        [2, 4, 61, 3, 30, 2],
    ]


def test_gradients_apart_take_half_of_a_backward_unless_told():
    durations = Durations((1,), (6,))
    assert [durations.of(phase, 0) for phase in Phase] == [1, 6, 3, 3]
    assert [Durations((1,), (6,), weight=(2,)).of(phase, 0) for phase in Phase] == [1, 6, 4, 2]
    assert [Durations((1,), (6,), weight=(2,), input_gradient=(5,)).of(p, 0) for p in Phase] == [1, 6, 5, 2]
    shared = Durations.equal(1, forward=1, backward=6, weight_share=0.25)
    assert [shared.of(phase, 0) for phase in Phase] == [1, 6, 4.5, 1.5]


def test_a_message_runs_beside_a_pass_when_they_overlap():
    """The second forward of rank 0 hides the message of the first; the last rank waits for one message."""
    durations = Durations.equal(2, forward=2, backward=2, transfer=1)
    placement = placement_of("forward_only", 2, 1)
    at_once, beside = (
        simulate(programs("forward_only", placement, 3, overlaps=overlaps), placement, durations).length
        for overlaps in (False, True)
    )
    assert at_once == 3 * (2 + 1) + 2
    assert beside == 2 + 1 + 3 * 2


def test_programs_without_their_ranks_are_refused():
    with pytest.raises(ScheduleError, match="3 programs for 2 ranks"):
        simulate(programs("gpipe", straight(3), 3), straight(2), Durations.equal(2, forward=1, backward=1))


def test_orders_can_be_simulated_as_they_are_written():
    orders = ((F0, I0, W0), (F0, B0))
    found = simulate(programs_of_orders(orders, straight(2)), straight(2), Durations((1, 1), (2, 2)))
    assert [row[-1].end for row in found.ranks] == [6, 4]


def test_too_few_durations_are_refused():
    with pytest.raises(
        ScheduleError, match=r"3 virtual stages need one duration of each kind for each stage, got .2, 2, 2."
    ):
        simulate(programs("gpipe", straight(3), 3), straight(3), Durations.equal(2, forward=1, backward=1))
