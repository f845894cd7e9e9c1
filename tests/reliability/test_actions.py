"""What a rank does: texts for people, seconds by kind, and an observer that sees a whole program."""

import time

import pytest

from megatron_bert_tp.pipeline.instructions import Await, Compute, Launch, Phase, Transfer
from megatron_bert_tp.pipeline.schedule import placement_of, programs
from megatron_bert_tp.reliability.actions import Actions, HostClock, Kind
from megatron_bert_tp.reliability.board import Board

HIDDEN = Transfer(Phase.FORWARD, 2, 0, 0, 1)
GRADIENT = Transfer(Phase.BACKWARD, 1, 1, 1, 0)


class Seen:
    """A sink that remembers."""

    def __init__(self):
        self.rows = []

    def show(self, kind, what, step):
        self.rows.append((kind, what, step))


@pytest.mark.parametrize(
    ("instruction", "kind", "text"),
    [
        (Compute(Phase.FORWARD, 3), Kind.FORWARD, "forward of microbatch 3"),
        (Compute(Phase.FORWARD, 3, 1), Kind.FORWARD, "forward of microbatch 3 (chunk 1)"),
        (Compute(Phase.BACKWARD, 0), Kind.BACKWARD, "backward of microbatch 0"),
        (Compute(Phase.INPUT_GRADIENT, 0), Kind.BACKWARD, "input gradient of microbatch 0"),
        (Compute(Phase.WEIGHT_GRADIENT, 5), Kind.WEIGHT_GRADIENT, "weight gradient of microbatch 5"),
        (Await((HIDDEN,)), Kind.MESSAGES, "waits for: hidden states of microbatch 2 from rank 4 to rank 6"),
        (
            Launch((HIDDEN, GRADIENT)),
            Kind.MESSAGES,
            "starts: hidden states of microbatch 2 from rank 4 to rank 6; "
            "gradient of microbatch 1 (chunk 1) from rank 6 to rank 4",
        ),
        (None, Kind.MESSAGES, "adds up the losses of all ranks"),
    ],
)
def test_an_instruction_is_told_in_words_with_global_ranks(instruction, kind, text):
    seen = Seen()
    actions = Actions(seen, pipeline_ranks=(4, 6))
    actions.begin_step(12)
    actions.instruction(instruction)
    actions.instruction(instruction)  # from memory
    assert seen.rows == [(kind, text, 12)] * 2


def test_without_global_ranks_places_on_the_pipeline_are_told():
    seen = Seen()
    Actions(seen).instruction(Await((HIDDEN,)))
    assert seen.rows[0][1] == "waits for: hidden states of microbatch 2 from rank 0 to rank 1"


def test_instructions_of_an_evaluation_belong_to_it():
    seen = Seen()
    actions = Actions(seen)
    with actions.within(Kind.EVALUATION):
        actions.instruction(Compute(Phase.FORWARD, 0))
        actions.instruction(None)
    actions.instruction(Compute(Phase.FORWARD, 1))
    assert [kind for kind, *_ in seen.rows] == [*[Kind.EVALUATION] * 3, Kind.FORWARD]
    assert seen.rows[1][1] == "forward of microbatch 0"


def test_seconds_belong_to_the_kind_that_was_entered_last():
    actions = Actions.silent()
    started = time.perf_counter()
    actions.take_seconds()
    for kind, seconds in ((Kind.DATA, 0.02), (Kind.FORWARD, 0.05), (Kind.DATA, 0.01)):
        actions.enter(kind)
        time.sleep(seconds)
    taken = actions.take_seconds()
    passed = time.perf_counter() - started
    assert taken[Kind.DATA] >= 0.03
    assert taken[Kind.FORWARD] >= 0.05
    assert 0.08 <= sum(taken.values()) <= passed
    assert set(actions.take_seconds()) <= {Kind.DATA}


def test_what_is_waited_for_inside_other_work_counts_as_messages():
    waited = [0.0]
    actions = Actions(Seen(), HostClock(lambda: waited[0]))
    actions.enter(Kind.FORWARD)
    actions.take_seconds()
    waited[0] += 1000.0  # more than has passed, so that no oversleeping can hide it
    actions.enter(Kind.BACKWARD)
    taken = actions.take_seconds()
    assert taken[Kind.MESSAGES] == 1000
    assert -1000 <= taken[Kind.FORWARD] < -900


def test_an_action_costs_microseconds():
    """3 microseconds are asked for; one is measured, and this bound leaves room for a loaded machine."""
    actions = Actions(Board.alone())
    program = programs("1f1b", placement_of("1f1b", num_ranks=2, num_virtual=1), num_microbatches=8)[0]
    rounds = []
    for _ in range(50):
        started = time.perf_counter()
        for instruction in program:
            actions.instruction(instruction)
        rounds.append((time.perf_counter() - started) / len(program))
    assert min(rounds) < 10e-6
