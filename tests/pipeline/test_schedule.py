"""Orders of passes and the messages that they imply, against hand-drawn schedules."""

import ast
import sys
from pathlib import Path

import pytest

import megatron_bert_tp.pipeline.schedule as schedule_module
from megatron_bert_tp.errors import ScheduleError
from megatron_bert_tp.pipeline.interleaved import groups
from megatron_bert_tp.pipeline.placement import looping, straight, v_shaped
from megatron_bert_tp.pipeline.schedule import (
    SCHEDULES,
    Await,
    Compute,
    Launch,
    Order,
    Phase,
    Program,
    Transfer,
    orders_of,
    placement_of,
    programs,
    programs_of_orders,
)

GPIPE_4_RANKS_8_MICROBATCHES = """
    F0 F1 F2 F3 F4 F5 F6 F7 B0 B1 B2 B3 B4 B5 B6 B7
    F0 F1 F2 F3 F4 F5 F6 F7 B0 B1 B2 B3 B4 B5 B6 B7
    F0 F1 F2 F3 F4 F5 F6 F7 B0 B1 B2 B3 B4 B5 B6 B7
    F0 F1 F2 F3 F4 F5 F6 F7 B0 B1 B2 B3 B4 B5 B6 B7
"""
ONE_F_ONE_B_4_RANKS_8_MICROBATCHES = """
    F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7
    F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7
    F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7
    F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7
"""
ONE_F_ONE_B_4_RANKS_2_MICROBATCHES = """
    F0 F1 B0 B1
    F0 F1 B0 B1
    F0 F1 B0 B1
    F0 B0 F1 B1
"""
# Narayanan et al. 2021, figure 4 (bottom), begins like this: microbatch.chunk
INTERLEAVED_2_RANKS_2_CHUNKS_4_MICROBATCHES = """
    F0.0 F1.0 F0.1 F1.1 F2.0 B0.1 F3.0 B1.1 F2.1 B0.0 F3.1 B1.0 B2.1 B3.1 B2.0 B3.0
    F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 F2.0 B0.0 F3.0 B1.0 F2.1 B2.1 F3.1 B3.1 B2.0 B3.0
"""
# 3 microbatches on 2 ranks are one group.
INTERLEAVED_2_RANKS_2_CHUNKS_3_MICROBATCHES = """
    F0.0 F1.0 F2.0 F0.1 F1.1 F2.1 B0.1 B1.1 B2.1 B0.0 B1.0 B2.0
    F0.0 F1.0 F2.0 F0.1 B0.1 F1.1 B1.1 F2.1 B2.1 B0.0 B1.0 B2.0
"""
# Qi et al. 2023, figure 2: the later the rank, the later its weight gradients.
ZB_H1_3_RANKS_5_MICROBATCHES = """
    F0 F1 F2 I0 W0 F3 I1 W1 F4 I2 W2 I3 W3 I4 W4
    F0 F1 I0 F2 I1 W0 F3 I2 W1 F4 I3 W2 I4 W3 W4
    F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 F4 I4 W2 W3 W4
"""
ZB_V_2_RANKS_4_MICROBATCHES = """
    F0.0 F1.0 F2.0 F0.1 I0.1 W0.1 F1.1 I1.1 W1.1 F3.0 I0.0 W0.0 F2.1 I2.1 W2.1 I1.0 W1.0 F3.1 I3.1 W3.1 \
        I2.0 W2.0 I3.0 W3.0
    F0.0 F0.1 F1.0 F1.1 I0.1 W0.1 F2.0 I0.0 W0.0 F2.1 I1.1 W1.1 F3.0 I1.0 W1.0 F3.1 I2.1 W2.1 I2.0 I3.1 I3.0 \
        W2.0 W3.1 W3.0
"""
FORWARD_ONLY_IN_A_LOOP_2_RANKS_4_MICROBATCHES = """
    F0.0 F1.0 F0.1 F1.1 F2.0 F3.0 F2.1 F3.1
    F0.0 F1.0 F0.1 F1.1 F2.0 F3.0 F2.1 F3.1
"""
FORWARD_ONLY_IN_A_V_3_RANKS_4_MICROBATCHES = """
    F0.0 F1.0 F2.0 F0.1 F3.0 F1.1 F2.1 F3.1
    F0.0 F1.0 F0.1 F2.0 F1.1 F3.0 F2.1 F3.1
    F0.0 F0.1 F1.0 F1.1 F2.0 F2.1 F3.0 F3.1
"""
# One gap in braces; a0> is the hidden states of microbatch 0 going out, >a0 coming in; g is a gradient.
ONE_F_ONE_B_MESSAGES_3_RANKS_3_MICROBATCHES = """
    F0 {a0>} F1 {a1>} F2 {a2> >g0} B0 {>g1} B1 {>g2} B2
    {>a0} F0 {a0> >a1} F1 {a1> >g0} B0 {g0> >a2} F2 {a2> >g1} B1 {g1> >g2} B2 {g2>}
    {>a0} F0 B0 {g0> >a1} F1 B1 {g1> >a2} F2 B2 {g2>}
"""
# Here what is awaited is in brackets: receives just before their pass, sends one pass later at least and not
# within two units of the walk F0 0-1, F1 1-2, B0 4-6, F2 6-7, B1 7-9, B2 10-12 of rank 0.
OVERLAPPED_1F1B_2_RANKS_3_MICROBATCHES = """
    F0 {a0> >g0} F1 {a1>} [a0> >g0] B0 {>g1} [a1>] F2 {a2> >g2} [>g1] B1 [a2> >g2] B2
    {>a0} [>a0] F0 {>a1} B0 {g0>} [>a1] F1 {>a2} B1 {g1>} [g0> >a2] F2 B2 {g2>} [g1> g2>]
"""
LETTERS = {phase.name[0]: phase for phase in Phase}


def parse(text: str) -> tuple[Order, ...]:
    """Orders of all ranks from a drawing with one row per rank."""
    return tuple(tuple(map(parse_pass, row.split())) for row in text.strip().replace("\\\n", "").splitlines())


def parse_pass(word: str) -> Compute:
    microbatch, _, chunk = word[1:].partition(".")
    return Compute(LETTERS[word[0]], int(microbatch), int(chunk or 0))


def write(program: Program, rank: int, *, awaits: bool = False) -> str:
    """A program in the notation of the drawings above."""
    words = []
    for instruction in program:
        if isinstance(instruction, Compute):
            words.append(f"{instruction.phase.name[0]}{instruction.microbatch}")
            continue
        messages = " ".join(write_transfer(t, rank) for t in instruction.transfers)
        if isinstance(instruction, Launch):
            words.append("{" + messages + "}")
        elif awaits:
            words.append("[" + messages + "]")
    return " ".join(words)


def write_transfer(transfer: Transfer, rank: int) -> str:
    name = f"{'a' if transfer.phase is Phase.FORWARD else 'g'}{transfer.microbatch}"
    return f"{name}>" if transfer.source == rank else f">{name}"


def rows(drawing: str) -> list[str]:
    return [row.strip() for row in drawing.strip().splitlines()]


@pytest.mark.parametrize(
    ("name", "placement", "num_microbatches", "drawing"),
    [
        ("gpipe", straight(4), 8, GPIPE_4_RANKS_8_MICROBATCHES),
        ("1f1b", straight(4), 8, ONE_F_ONE_B_4_RANKS_8_MICROBATCHES),
        ("1f1b", straight(4), 2, ONE_F_ONE_B_4_RANKS_2_MICROBATCHES),
        ("interleaved", straight(4), 8, ONE_F_ONE_B_4_RANKS_8_MICROBATCHES),
        ("interleaved", looping(2, 2), 4, INTERLEAVED_2_RANKS_2_CHUNKS_4_MICROBATCHES),
        ("interleaved", looping(2, 2), 3, INTERLEAVED_2_RANKS_2_CHUNKS_3_MICROBATCHES),
        ("zb-h1", straight(3), 5, ZB_H1_3_RANKS_5_MICROBATCHES),
        ("zb-v", v_shaped(2), 4, ZB_V_2_RANKS_4_MICROBATCHES),
        ("forward_only", straight(2), 3, "F0 F1 F2\nF0 F1 F2"),
        ("forward_only", looping(2, 2), 4, FORWARD_ONLY_IN_A_LOOP_2_RANKS_4_MICROBATCHES),
        ("forward_only", v_shaped(3), 4, FORWARD_ONLY_IN_A_V_3_RANKS_4_MICROBATCHES),
    ],
)
def test_order_equals_the_hand_drawn_schedule(name, placement, num_microbatches, drawing):
    assert orders_of(name, placement, num_microbatches) == parse(drawing)


def megatron_order(rank: int, num_ranks: int, num_chunks: int, num_microbatches: int) -> Order:
    """The numbering of Megatron-LM's `forward_backward_pipelining_with_interleaving`, written out."""
    total = num_microbatches * num_chunks

    def numbered(phase: Phase, number: int) -> Compute:
        in_group = number % (num_ranks * num_chunks)
        chunk = in_group // num_ranks
        microbatch = number // (num_ranks * num_chunks) * num_ranks + number % num_ranks
        return Compute(phase, microbatch, chunk if phase is Phase.FORWARD else num_chunks - chunk - 1)

    warmup = min((num_ranks - rank - 1) * 2 + (num_chunks - 1) * num_ranks, total)
    order = [numbered(Phase.FORWARD, number) for number in range(warmup)]
    for number in range(total - warmup):
        order += [numbered(Phase.FORWARD, number + warmup), numbered(Phase.BACKWARD, number)]
    return (*order, *(numbered(Phase.BACKWARD, number) for number in range(total - warmup, total)))


@pytest.mark.parametrize("num_ranks", range(1, 7))
@pytest.mark.parametrize("num_chunks", [2, 3, 4])
def test_interleaved_is_megatrons_order_for_multiples_of_the_ranks(num_ranks, num_chunks):
    for num_microbatches in range(num_ranks, 33, num_ranks):
        assert orders_of("interleaved", looping(num_ranks, num_chunks), num_microbatches) == tuple(
            megatron_order(rank, num_ranks, num_chunks, num_microbatches) for rank in range(num_ranks)
        )


def test_groups_have_as_many_microbatches_as_ranks_or_a_little_more():
    assert [list(map(len, groups(count, 4))) for count in (1, 4, 7, 8, 11, 13)] == [
        [1], [4], [7], [4, 4], [6, 5], [5, 4, 4]
    ]  # fmt: skip


def test_messages_of_one_f_one_b_equal_the_hand_drawn_ones():
    drawn = rows(ONE_F_ONE_B_MESSAGES_3_RANKS_3_MICROBATCHES)
    assert [write(program, rank) for rank, program in enumerate(programs("1f1b", straight(3), 3))] == drawn


def test_overlapped_messages_of_one_f_one_b_equal_the_hand_drawn_ones():
    found = programs("1f1b", straight(2), 3, overlaps=True)
    assert [write(program, rank, awaits=True) for rank, program in enumerate(found)] == rows(
        OVERLAPPED_1F1B_2_RANKS_3_MICROBATCHES
    )


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "forward_only"])
def test_each_launch_is_awaited_whole_and_at_once_where_ranks_meet(name):
    for program in programs(name, straight(4), 8):
        for place, instruction in enumerate(program):
            if isinstance(instruction, Launch):
                assert program[place + 1] == Await(instruction.transfers)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("overlaps", [False, True])
def test_one_rank_is_its_order_without_messages(name, overlaps):
    placement = placement_of(name, 1, SCHEDULES[name].num_virtual or 3)
    assert programs(name, placement, 5, overlaps=overlaps) == orders_of(name, placement, 5)


def test_last_rank_sends_nothing_in_forward_only():
    last = programs("forward_only", straight(3), 4)[-1]
    assert all(t.target == 2 for i in last if isinstance(i, Launch) for t in i.transfers)


def test_unknown_schedule_is_refused_with_the_names_that_work():
    for build in (lambda: programs("2f2b", straight(2), 2), lambda: placement_of("2f2b", 2, 1)):
        with pytest.raises(ScheduleError, match="unknown schedule '2f2b'; choose one of gpipe, 1f1b, interleaved"):
            build()


@pytest.mark.parametrize(
    ("name", "num_virtual", "told"),
    [
        (
            "1f1b",
            2,
            "1f1b puts 1 virtual stages on a rank, not 2; use 1, or .* 2: interleaved, zb-v, forward_only",
        ),
        (
            "zb-v",
            1,
            "zb-v puts 2 virtual stages on a rank, not 1; use 2, or .* 1: gpipe, 1f1b, interleaved, zb-h1",
        ),
        ("interleaved", 0, "at least one of its virtual stages on a rank, got 0"),
    ],
)
def test_a_number_of_virtual_stages_that_does_not_fit_is_refused(name, num_virtual, told):
    with pytest.raises(ScheduleError, match=told):
        placement_of(name, 4, num_virtual)


def test_a_placement_of_another_schedule_is_refused():
    with pytest.raises(ScheduleError, match=r"zb-v places its stages as .*; use placement_of\('zb-v', 4, 2\)"):
        programs("zb-v", looping(4, 2), 8)


def test_empty_pipeline_is_refused():
    with pytest.raises(ScheduleError, match="at least one of its ranks, got 0"):
        placement_of("gpipe", 0, 1)
    with pytest.raises(ScheduleError, match="at least one microbatch, got 0"):
        programs("gpipe", straight(2), 0)


@pytest.mark.parametrize(
    ("drawing", "told"),
    [
        ("F0 B0", "1 orders for 2 ranks"),
        (
            "F0 B0 F1 B1\nF1 B1 F0 B0",
            "deadlock: .*\n  rank 0, pass 1 of 4, backward of microbatch 0 .* needs gradient",
        ),
        (
            "F0 F1\nF0",
            "rank 0 makes the hidden states of microbatch 1 .* to rank 1, for which that rank has no pass",
        ),
    ],
)
def test_orders_that_cannot_run_are_refused(drawing, told):
    with pytest.raises(ScheduleError, match=f"(?s){told}"):
        programs_of_orders(parse(drawing), straight(2))


# All but the one module that runs a program.
MODULES = sorted(p for p in Path(schedule_module.__file__).parent.glob("*.py") if p.stem != "executor")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_schedules_do_not_import_torch(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    own = ("megatron_bert_tp.errors", "megatron_bert_tp.pipeline.")
    assert all(m.startswith(own) or m.split(".")[0] in sys.stdlib_module_names for m in modules)
