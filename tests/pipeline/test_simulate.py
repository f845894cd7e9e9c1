"""The simulation against closed formulas, and planted faults that it has to report."""

import pytest

from megatron_bert_tp.errors import ScheduleError
from megatron_bert_tp.pipeline.schedule import (
    Await,
    Compute,
    Instruction,
    Launch,
    Phase,
    Program,
    Transfer,
    add_messages,
    forward_only,
    programs,
)
from megatron_bert_tp.pipeline.simulate import Durations, Interval, Timeline, simulate

MICROBATCHES = range(1, 33)
F0, B0 = Compute(Phase.FORWARD, 0), Compute(Phase.BACKWARD, 0)


def timeline(name: str, num_stages: int, num_microbatches: int) -> Timeline:
    return run(list(programs(name, num_stages, num_microbatches)))


def run(stages: list[Program]) -> Timeline:
    """Simulate with backwards twice as long as forwards."""
    return simulate(stages, Durations.equal(len(stages), forward=1, backward=2))


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


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("num_stages", range(1, 9))
def test_length_is_m_plus_p_minus_1_times_both_passes(name: str, num_stages: int) -> None:
    for m in MICROBATCHES:
        assert timeline(name, num_stages, m).length == (m + num_stages - 1) * (1 + 2)


@pytest.mark.parametrize("num_stages", range(1, 9))
def test_forward_only_takes_m_plus_p_minus_1_forwards(num_stages: int) -> None:
    for m in MICROBATCHES:
        assert timeline("forward_only", num_stages, m).length == m + num_stages - 1


@pytest.mark.parametrize("num_stages", range(1, 9))
def test_idle_share_is_p_minus_1_over_m_plus_p_minus_1(num_stages: int) -> None:
    for m in MICROBATCHES:
        assert timeline("1f1b", num_stages, m).idle_share == (num_stages - 1) / (m + num_stages - 1)


@pytest.mark.parametrize("num_stages", range(1, 9))
def test_one_f_one_b_holds_p_minus_stage_activations_at_most(num_stages: int) -> None:
    for m in MICROBATCHES:
        line = timeline("1f1b", num_stages, m)
        held = [line.peak_live(stage) for stage in range(num_stages)]
        assert held == [min(num_stages - stage, m) for stage in range(num_stages)]
        assert line.max_peak_live == min(num_stages, m)


def test_gpipe_holds_the_activations_of_all_microbatches() -> None:
    for m in MICROBATCHES:
        line = timeline("gpipe", 4, m)
        assert [line.peak_live(stage) for stage in range(4)] == [m] * 4


def test_evaluation_holds_one_microbatch() -> None:
    assert [timeline("forward_only", 4, 8).peak_live(stage) for stage in range(4)] == [1] * 4


def test_two_stages_and_two_microbatches_run_at_the_hand_computed_times() -> None:
    passes = [Compute(phase, m) for m in range(2) for phase in Phase]  # F0 B0 F1 B1
    f0, b0, f1, b1 = passes
    first = (Interval(0, 1, f0), Interval(1, 2, f1), Interval(4, 6, b0), Interval(7, 9, b1))
    last = (Interval(1, 2, f0), Interval(2, 4, b0), Interval(4, 5, f1), Interval(5, 7, b1))
    assert timeline("1f1b", 2, 2).stages == (first, last)


def test_messages_delay_the_next_stage_by_their_time() -> None:
    durations = Durations.equal(3, forward=1, backward=2, transfer=0.5)
    assert simulate(programs("1f1b", 3, 1), durations).length == 3 * (1 + 2) + 4 * 0.5


def test_pass_between_launch_and_await_hides_the_message() -> None:
    f1 = Compute(Phase.FORWARD, 1)
    send = tuple(Transfer(Phase.FORWARD, m, 0, source=0, target=1) for m in range(2))
    overlapped = (F0, Launch(send[:1]), f1, Launch(send[1:]), Await(send))
    eager = (Launch(send[:1]), Launch(send[1:]), Await(send[:1]), F0, Await(send[1:]), f1)
    line = simulate([overlapped, eager], Durations((1, 4), (1, 1), transfer=0.5))
    assert line.stages[0] == (Interval(0, 1, F0), Interval(1, 2, f1))
    assert line.stages[1] == (Interval(1.5, 5.5, F0), Interval(5.5, 9.5, f1))


def test_slow_stage_sets_the_pace() -> None:
    durations = Durations(forward=(1, 5, 1), backward=(1, 5, 1))
    length = simulate(programs("gpipe", 3, 10), durations).length
    assert length == 1 + 10 * 5 + 1 + 1 + 10 * 5 + 1


def test_messages_sent_one_by_one_deadlock_and_every_stuck_stage_is_named() -> None:
    with pytest.raises(ScheduleError) as caught:
        run([one_by_one(program) for program in programs("1f1b", 2, 4)])
    assert str(caught.value).splitlines() == [
        "deadlock: these stages wait for each other for ever; "
        "launch the messages of one gap together, sends and receives",
        "  stage 0, instruction 5 of 24: Await of hidden states of microbatch 1 from stage 0 to stage 1, "
        "which stage 1 has not launched",
        "  stage 1, instruction 5 of 24: Await of gradient of microbatch 0 from stage 1 to stage 0, "
        "which stage 0 has not launched",
    ]


def test_receives_in_another_order_than_the_sends_are_reported() -> None:
    ascending = forward_only(0, num_stages=2, num_microbatches=3)
    swapped = (ascending[1], ascending[0], ascending[2])
    message = (
        "message 0 from stage 0 to stage 1 does not match: stage 0 sends hidden states of microbatch 0 .*, "
        "stage 1 receives hidden states of microbatch 1"
    )
    with pytest.raises(ScheduleError, match=message):
        run(list(add_messages([ascending, swapped])))


def test_send_that_nobody_receives_is_reported() -> None:
    first, _ = programs("forward_only", 2, 1)
    with pytest.raises(ScheduleError, match=r"sends hidden states .*, stage 1 receives nothing"):
        run([first, ()])


def test_receive_that_nobody_sends_is_reported() -> None:
    _, second = programs("forward_only", 2, 1)
    with pytest.raises(ScheduleError, match="stage 0 sends nothing, stage 1 receives hidden states"):
        run([(F0,), second])


FIRST, LAST = programs("forward_only", 2, 1)
ACTIVATION = Transfer(Phase.FORWARD, 0, 0, source=0, target=1)
SEND, SENT = Launch((ACTIVATION,)), Await((ACTIVATION,))


@pytest.mark.parametrize(
    ("faulty", "rule"),
    [
        ([FIRST, without(Await, LAST)], "stage 1 starts the forward of microbatch 0 before it awaits"),
        ([without(Await, FIRST), LAST], "stage 0 never awaits hidden states"),
        ([without(Launch, FIRST), LAST], "stage 0 awaits hidden states .* before its launch"),
        ([(SEND, SENT, F0), LAST], "stage 0 sends hidden states .* before it is computed"),
        ([(F0, SEND, SENT, SEND), LAST], "stage 0 launches hidden states .* twice"),
        ([(F0, SEND, SENT, SENT), LAST], "stage 0 awaits hidden states .* twice"),
        ([FIRST, LAST, (SEND, SENT)], "stage 2 launches .*, which is not its own"),
        ([(F0, SEND, SENT)], "stage 0 launches .*, but the stages are 0 to 0"),
        ([(B0, F0)], "stage 0 starts the backward of microbatch 0 before its forward"),
    ],
)
def test_rule_that_a_program_breaks_is_named(faulty: list[Program], rule: str) -> None:
    with pytest.raises(ScheduleError, match=rule):
        run(faulty)


def test_too_few_durations_are_refused() -> None:
    with pytest.raises(ScheduleError, match="3 programs need as many durations, got 2"):
        simulate(programs("gpipe", 3, 3), Durations.equal(2, forward=1, backward=1))
