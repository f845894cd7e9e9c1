"""Orders of passes and the messages that they imply, against hand-drawn schedules."""

import ast
import sys
from pathlib import Path

import pytest

import megatron_bert_tp.pipeline.schedule as schedule_module
from megatron_bert_tp.errors import ScheduleError
from megatron_bert_tp.pipeline.schedule import (
    ORDERS,
    Await,
    Compute,
    Launch,
    Order,
    Phase,
    Program,
    Transfer,
    programs,
)

GPIPE_4_STAGES_8_MICROBATCHES = """
    F0 F1 F2 F3 F4 F5 F6 F7 B0 B1 B2 B3 B4 B5 B6 B7
    F0 F1 F2 F3 F4 F5 F6 F7 B0 B1 B2 B3 B4 B5 B6 B7
    F0 F1 F2 F3 F4 F5 F6 F7 B0 B1 B2 B3 B4 B5 B6 B7
    F0 F1 F2 F3 F4 F5 F6 F7 B0 B1 B2 B3 B4 B5 B6 B7
"""
ONE_F_ONE_B_4_STAGES_8_MICROBATCHES = """
    F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7
    F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7
    F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7
    F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7
"""
ONE_F_ONE_B_4_STAGES_2_MICROBATCHES = """
    F0 F1 B0 B1
    F0 F1 B0 B1
    F0 F1 B0 B1
    F0 B0 F1 B1
"""
# One gap in braces; a0> is the hidden states of microbatch 0 going out, >a0 coming in; g is a gradient.
ONE_F_ONE_B_MESSAGES_3_STAGES_3_MICROBATCHES = """
    F0 {a0>} F1 {a1>} F2 {a2> >g0} B0 {>g1} B1 {>g2} B2
    {>a0} F0 {a0> >a1} F1 {a1> >g0} B0 {g0> >a2} F2 {a2> >g1} B1 {g1> >g2} B2 {g2>}
    {>a0} F0 B0 {g0> >a1} F1 B1 {g1> >a2} F2 B2 {g2>}
"""


def parse(text: str) -> list[Order]:
    """Orders of all stages from a drawing with one row per stage."""
    phases = {"F": Phase.FORWARD, "B": Phase.BACKWARD}
    rows = [row.split() for row in text.strip().splitlines()]
    return [tuple(Compute(phases[word[0]], int(word[1:])) for word in row) for row in rows]


def orders(name: str, num_stages: int, num_microbatches: int) -> list[Order]:
    sizes = {"num_stages": num_stages, "num_microbatches": num_microbatches}
    return [ORDERS[name](stage, **sizes) for stage in range(num_stages)]


def write(program: Program, stage: int) -> str:
    """A program in the notation of the drawing above."""
    words = []
    for instruction in program:
        if isinstance(instruction, Compute):
            words.append(f"{instruction.phase.name[0]}{instruction.microbatch}")
        elif isinstance(instruction, Launch):
            words.append("{" + " ".join(write_transfer(t, stage) for t in instruction.transfers) + "}")
    return " ".join(words)


def write_transfer(transfer: Transfer, stage: int) -> str:
    name = f"{'a' if transfer.phase is Phase.FORWARD else 'g'}{transfer.microbatch}"
    return f"{name}>" if transfer.source == stage else f">{name}"


@pytest.mark.parametrize(
    ("name", "num_microbatches", "drawing"),
    [
        ("gpipe", 8, GPIPE_4_STAGES_8_MICROBATCHES),
        ("1f1b", 8, ONE_F_ONE_B_4_STAGES_8_MICROBATCHES),
        ("1f1b", 2, ONE_F_ONE_B_4_STAGES_2_MICROBATCHES),
    ],
)
def test_order_equals_the_hand_drawn_schedule(name: str, num_microbatches: int, drawing: str) -> None:
    assert orders(name, 4, num_microbatches) == parse(drawing)


def test_forward_only_runs_every_microbatch_once_in_order() -> None:
    assert orders("forward_only", 2, 3) == parse("F0 F1 F2\nF0 F1 F2")


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("num_stages", range(1, 9))
def test_both_phases_of_all_microbatches_ascend_on_every_stage(name: str, num_stages: int) -> None:
    for num_microbatches in range(1, 33):
        for order in orders(name, num_stages, num_microbatches):
            for phase in Phase:
                of_phase = [compute.microbatch for compute in order if compute.phase is phase]
                assert of_phase == list(range(num_microbatches))


def test_messages_of_one_f_one_b_equal_the_hand_drawn_ones() -> None:
    drawn = [row.strip() for row in ONE_F_ONE_B_MESSAGES_3_STAGES_3_MICROBATCHES.strip().splitlines()]
    assert [write(program, stage) for stage, program in enumerate(programs("1f1b", 3, 3))] == drawn


@pytest.mark.parametrize("name", ORDERS)
def test_each_launch_is_awaited_whole_and_at_once(name: str) -> None:
    for program in programs(name, 4, 8):
        for place, instruction in enumerate(program):
            if isinstance(instruction, Launch):
                assert program[place + 1] == Await(instruction.transfers)


@pytest.mark.parametrize("name", ORDERS)
def test_one_stage_is_its_order_without_messages(name: str) -> None:
    assert programs(name, 1, 5) == tuple(orders(name, 1, 5))


def test_last_stage_sends_nothing_in_forward_only() -> None:
    assert not [i for i in programs("forward_only", 1, 4)[0] if isinstance(i, Launch)]
    last = programs("forward_only", 3, 4)[-1]
    assert all(t.target == 2 for i in last if isinstance(i, Launch) for t in i.transfers)


def test_unknown_schedule_is_refused_with_the_names_that_work() -> None:
    with pytest.raises(ScheduleError, match="unknown schedule '2f2b'; choose one of gpipe, 1f1b"):
        programs("2f2b", 2, 2)


@pytest.mark.parametrize(("sizes", "named"), [((0, 4), "stages, got 0"), ((2, 0), "microbatches, got 0")])
def test_empty_pipeline_is_refused(sizes: tuple[int, int], named: str) -> None:
    with pytest.raises(ScheduleError, match=named):
        programs("gpipe", *sizes)


@pytest.mark.parametrize("name", ["schedule", "messages", "simulate", "timeline", "partition"])
def test_schedules_do_not_import_torch(name: str) -> None:
    path = Path(schedule_module.__file__).with_name(f"{name}.py")
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    own = ("megatron_bert_tp.errors", "megatron_bert_tp.pipeline.")
    assert all(m.startswith(own) or m.split(".")[0] in sys.stdlib_module_names for m in modules)
