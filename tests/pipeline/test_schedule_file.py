"""Schedule files: what is written is read back, a hand-written one runs, and every mistake is told where it is."""

import pytest

from megatron_bert_tp.errors import ScheduleError
from megatron_bert_tp.pipeline.placement import Placement, looping, straight, v_shaped
from megatron_bert_tp.pipeline.schedule import Compute, Phase, orders_of
from megatron_bert_tp.pipeline.schedule_file import LARGEST_FILE, ScheduleFile, read_schedule, write_schedule

BY_HAND = """\
# Two ranks; the second one puts its weight gradients off.
placement: straight
microbatches: 2   # of a step
rank 0: F0 F1 B0 B1

rank 1: F0 I0 F1 I1 W0 W1
"""
LOOP = """\
placement: looping
microbatches: 1
rank 0: F0.0 F0.1 B0.1 B0.0
rank 1: F0.0 F0.1 B0.1 B0.0
"""


@pytest.fixture
def read(tmp_path):
    def read_text(text: str | bytes) -> ScheduleFile:
        path = tmp_path / "own.schedule"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_schedule(path)

    return read_text


def test_a_file_written_by_hand_says_what_it_says(read):
    f0, b0, i0, w0 = (Compute(phase, 0) for phase in Phase)
    f1, b1, i1, w1 = (Compute(phase, 1) for phase in Phase)
    assert read(BY_HAND) == ScheduleFile(straight(2), ((f0, f1, b0, b1), (f0, i0, f1, i1, w0, w1)))
    assert read(BY_HAND).num_microbatches == 2


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        ("gpipe", straight(3)),
        ("1f1b", straight(1)),
        ("1f1b", straight(12)),
        ("interleaved", looping(3, 4)),
        ("zb-h1", straight(4)),
        ("zb-v", v_shaped(4)),
    ],
)
@pytest.mark.parametrize("num_microbatches", [1, 5, 12])
def test_every_schedule_of_training_can_be_written_and_read_back(read, name, placement, num_microbatches):
    orders = orders_of(name, placement, num_microbatches)
    assert read(write_schedule(orders, placement)) == ScheduleFile(placement, orders)


@pytest.mark.parametrize("placement", [straight(2), looping(2, 3), v_shaped(3)])
def test_a_schedule_that_would_train_nothing_is_refused(read, placement):
    text = write_schedule(orders_of("forward_only", placement, 5), placement)
    told = "rank 0: there are 0 backwards of chunk 0, and there must be 5: write a B, or an I and later a W"
    with pytest.raises(ScheduleError, match=f"line 4: {told}"):
        read(text)


def test_the_mark_that_some_editors_put_first_is_no_mistake(read):
    assert read(b"\xef\xbb\xbf" + BY_HAND.encode()) == read(BY_HAND)


def test_the_text_of_a_schedule_is_as_drawn():
    assert write_schedule(orders_of("zb-h1", straight(2), 2), straight(2)).splitlines()[1:] == [
        "placement: straight",
        "microbatches: 2",
        "rank 0: F0 F1 I0 W0 I1 W1",
        "rank 1: F0 I0 F1 I1 W0 W1",
    ]


def test_a_placement_without_a_name_is_not_written():
    placement = Placement(((1,), (0,)))
    with pytest.raises(ScheduleError, match="takes one of the placements straight, looping, v"):
        write_schedule(orders_of("forward_only", placement, 1), placement)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("placement: straight", "placement: zigzag", "line 2: placement must be one of .*, got 'zigzag'"),
        ("placement: straight\n", "", "the line 'placement: ...' is missing; add"),
        ("microbatches: 2", "microbatches: two", "line 3: microbatches must be a number .*, got 'two'"),
        ("microbatches: 2", "microbatches: 0", "line 3: microbatches must be .*, got '0'"),
        ("microbatches: 2", "microbatches: 3", "line 4: rank 0: there are 2 forwards .* must be 3"),
        ("microbatches: 2", "speed: 2", "line 3: 'speed: 2.*' is no line of a schedule; write"),
        ("rank 1:", "rank 0:", "line 6: 'rank 0' stands in line 4 already"),
        ("rank 1:", "rank 2:", r"there must be a line for every rank from 0 on, .* got ranks \[0, 2\]"),
        ("rank 0: F0 F1 B0 B1", "rank 0: F0 F1 B0 X1", "line 4: 'X1' is no pass; write F, B, I or W"),
        ("rank 0: F0 F1 B0 B1", "rank 0: F0 F1 B0 B-1", "line 4: 'B-1' is no pass"),
        ("rank 0: F0 F1 B0 B1", "rank 0: F0 F1 B0 B1.1", "line 4: rank 0 has 2 chunks; .* straight takes 1, and"),
        ("rank 0: F0 F1 B0 B1", "rank 0: F1 F0 B0 B1", "line 4: rank 0: forwards .* is microbatch 1 .* be 0"),
        ("rank 0: F0 F1 B0 B1", "rank 0: F0 F1 B1 B0", "line 4: rank 0: backwards .* is microbatch 1 .* be 0"),
        ("rank 0: F0 F1 B0 B1", "rank 0: F0 F1 B0", "line 4: rank 0: there are 1 backwards .* must be 2"),
        ("rank 0: F0 F1 B0 B1", "rank 0: F0 F1 B0 B1 B1", "line 4: rank 0: there are 3 backwards"),
        ("rank 0: F0 F1 B0 B1", "rank 0: F0 B0 B1 F1", "line 4: rank 0: the backward .* before its forward"),
        ("I1 W0 W1", "I1 W0", "line 6: rank 1: there are 1 weight gradients of chunk 0, and there must be 2"),
        ("I1 W0 W1", "I1 W1 W0", "line 6: rank 1: weight gradients .* number 0 .* microbatch 1 .* be 0"),
        ("I0 F1 I1 W0", "W0 F1 I0 I1", "line 6: rank 1: the weight .* before its input gradient"),
        ("I1 W0 W1", "I1 W0 W1 B1", "line 6: rank 1: there are 3 backwards"),
        ("F0 I0 F1 I1 W0 W1", "F0 F1", "line 6: rank 1: there are 0 backwards of chunk 0, and there must be 2"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_line(read, old, new, told):
    assert old in BY_HAND
    with pytest.raises(ScheduleError, match=f"own.schedule(, |: ){told}"):
        read(BY_HAND.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new"),
    [("F0 F1 B0 B1", "F0 B0 F1 B1"), ("F0 I0 F1 I1 W0 W1", "F0 B0 F1 I1 W1"), ("W0 W1", " W0\tW1 # last")],
)
def test_what_keeps_the_rules_is_taken(read, old, new):
    assert read(BY_HAND.replace(old, new, 1)).num_microbatches == 2


def test_a_deadlock_is_told(read):
    """Rank 0 wants the gradient of 0 before it sends 1, and rank 1 wants 1 first."""
    text = BY_HAND.replace("F0 F1 B0 B1", "F0 B0 F1 B1").replace("F0 I0 F1 I1 W0 W1", "F0 F1 B0 B1")
    with pytest.raises(
        ScheduleError, match=r"own.schedule: deadlock: .*\n  rank 0, pass 1 of 4, .*\n  rank 1, pass 1"
    ):
        read(text)


def test_chunks_that_differ_between_ranks_are_refused(read):
    assert read(LOOP).placement == looping(2, 2)
    assert read(LOOP.replace("looping", "v")).placement == v_shaped(2)
    with pytest.raises(ScheduleError, match=r"line 4: rank 1 has 1 chunks; .* as rank 0, which has 2"):
        read(LOOP.replace("rank 1: F0.0 F0.1 B0.1 B0.0", "rank 1: F0.0 B0.0"))
    with pytest.raises(ScheduleError, match="line 3: rank 0 has 3 chunks; placement v takes 2, and"):
        read(LOOP.replace("looping", "v").replace("F0.1", "F0.2"))


def test_what_is_no_schedule_file_is_refused(read, tmp_path):
    with pytest.raises(ScheduleError, match=f"more than {LARGEST_FILE} bytes"):
        read(b"#" * (LARGEST_FILE + 1))
    with pytest.raises(ScheduleError, match="byte 0 is no UTF-8"):
        read(b"\xff\xfe")
    for path in (tmp_path, tmp_path / "none.schedule"):
        with pytest.raises(ScheduleError, match="there is no such file"):
            read_schedule(path)
    with pytest.raises(ScheduleError, match=r"the line 'microbatches: ...' is missing"):
        read("")
    with pytest.raises(ScheduleError, match=r"a line for every rank from 0 on, .* got ranks \[\]"):
        read("placement: straight\nmicrobatches: 1\n")
