"""What every schedule keeps, at every size: each pass once, ascending, no deadlock, known lengths and memory."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, product

import pytest

from megatron_bert_tp.pipeline.placement import Placement, looping, straight, v_shaped
from megatron_bert_tp.pipeline.schedule import (
    Await,
    Compute,
    Launch,
    Order,
    Phase,
    Program,
    input_transfer,
    orders_of,
    placement_of,
    programs,
)
from megatron_bert_tp.pipeline.simulate import Durations, Timeline, simulate

MICROBATCHES = (*range(1, 18), 23, 32)
FEW_MICROBATCHES = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16)
RANKS = range(1, 9)
SOME_RANKS = (1, 2, 3, 4, 6, 8)
JOINT, SPLIT = {Phase.FORWARD, Phase.BACKWARD}, set(Phase) - {Phase.BACKWARD}
PHASES = {
    "gpipe": JOINT, "1f1b": JOINT, "interleaved": JOINT, "zb-h1": SPLIT, "zb-v": SPLIT,
    "forward_only": {Phase.FORWARD},
}  # fmt: skip
VIRTUAL = {"interleaved": (1, 2, 3, 4), "zb-v": (2,), "forward_only": (1, 2, 3)}


def placements(name: str, ranks: Sequence[int] = RANKS) -> Iterator[Placement]:
    for num_ranks in ranks:
        for num_virtual in VIRTUAL.get(name, (1,)):
            yield placement_of(name, num_ranks, num_virtual)
        if name == "forward_only":
            yield v_shaped(num_ranks)


def timeline(name: str, placement: Placement, num_microbatches: int, *, overlaps=False, **times) -> Timeline:
    durations = Durations.equal(placement.num_stages, **({"forward": 1, "backward": 2} | times))
    return simulate(programs(name, placement, num_microbatches, overlaps=overlaps), placement, durations)


def length(name: str, placement: Placement, num_microbatches: int, **options) -> float:
    return timeline(name, placement, num_microbatches, **options).length


def peaks(line: Timeline) -> list[int]:
    return [line.peak_live(rank) for rank in range(len(line.ranks))]


def microbatches_of(order: Order, chunk: int, *phases: Phase) -> list[int]:
    return [c.microbatch for c in order if c.chunk == chunk and c.phase in phases]


@pytest.mark.parametrize("name", PHASES)
def test_every_pass_comes_once_and_ascends_on_each_chunk(name):
    for placement, count in product(placements(name), range(1, 33)):
        for order in orders_of(name, placement, count):
            assert len(order) == len(PHASES[name]) * count * placement.num_chunks
            for phase, chunk in product(PHASES[name], range(placement.num_chunks)):
                assert microbatches_of(order, chunk, phase) == list(range(count))


@pytest.mark.parametrize("name", PHASES)
@pytest.mark.parametrize("overlaps", [False, True])
def test_no_size_deadlocks_and_every_message_fits(name, overlaps):
    """`simulate` checks the messages and refuses a deadlock; uneven stages make ranks meet at odd times."""
    for placement, count in product(placements(name, SOME_RANKS), FEW_MICROBATCHES):
        uneven = [1 + stage % 3 for stage in range(placement.num_stages)]
        durations = Durations(tuple(uneven), tuple(2 * time for time in reversed(uneven)), transfer=0.25)
        found = simulate(programs(name, placement, count, overlaps=overlaps), placement, durations)
        assert [len(row) for row in found.ranks] == [len(order) for order in orders_of(name, placement, count)]


@pytest.mark.parametrize("name", PHASES)
def test_the_order_of_passes_is_the_same_in_both_message_modes(name):
    for placement, count in product(placements(name), (1, 5, 8)):
        for overlaps in (False, True):
            found = programs(name, placement, count, overlaps=overlaps)
            passes = tuple(tuple(i for i in program if isinstance(i, Compute)) for program in found)
            assert passes == orders_of(name, placement, count)


# Lengths and memory


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_length_is_m_plus_p_minus_1_times_both_passes(name, num_ranks):
    for m in MICROBATCHES:
        assert length(name, straight(num_ranks), m) == (m + num_ranks - 1) * (1 + 2)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_idle_share_is_p_minus_1_over_m_plus_p_minus_1(num_ranks):
    for m in MICROBATCHES:
        assert timeline("1f1b", straight(num_ranks), m).idle_share == (num_ranks - 1) / (m + num_ranks - 1)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_one_f_one_b_holds_p_minus_rank_activations_at_most(num_ranks):
    for m in MICROBATCHES:
        line = timeline("1f1b", straight(num_ranks), m)
        assert peaks(line) == [min(num_ranks - rank, m) for rank in range(num_ranks)]


def test_gpipe_holds_the_activations_of_all_microbatches():
    for m in MICROBATCHES:
        assert peaks(timeline("gpipe", straight(4), m)) == [m] * 4


@pytest.mark.parametrize("num_virtual", [1, 2, 3, 4])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_the_bubble_of_interleaved_is_p_minus_1_over_v_m_from_p_microbatches_on(num_ranks, num_virtual):
    """Of the ideal time; with fewer than p microbatches each further round waits for the first to come round."""
    placement = looping(num_ranks, num_virtual)
    for m in FEW_MICROBATCHES:
        rounds = m * num_virtual if m >= num_ranks else (num_virtual - 1) * num_ranks + m
        assert length("interleaved", placement, m) == (rounds + num_ranks - 1) * 3


@pytest.mark.parametrize("num_virtual", [2, 3, 4])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_interleaved_holds_p_minus_1_chunks_more_than_1f1b_has_layers(num_ranks, num_virtual):
    """Rank 0: p v + p - 1 chunks of L / (p v) layers, which is L (1 + (p - 1) / (p v)); never more than all."""
    for multiple in (1, 2, 3):
        line = timeline("interleaved", looping(num_ranks, num_virtual), multiple * num_ranks)
        assert peaks(line) == [
            min(
                (num_virtual - 1) * num_ranks + 2 * (num_ranks - rank - 1) + 1,
                num_virtual * multiple * num_ranks,
            )
            for rank in range(num_ranks)
        ]


@pytest.mark.parametrize("num_ranks", RANKS)
def test_zb_h1_is_as_short_as_can_be_when_all_three_passes_are_equal(num_ranks):
    """The last rank starts after p - 1 forwards and has 3 m passes; after its last input gradient, which comes
    behind its m forwards and m input gradients, p - 1 more follow, and a weight gradient on rank 0."""
    p = num_ranks
    for m in MICROBATCHES:
        assert length("zb-h1", straight(p), m) == max(p - 1 + 3 * m, p - 1 + 2 * m + (p - 1) + 1)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_zb_h1_holds_the_activations_of_1f1b_and_puts_off_rank_plus_1_weight_gradients(num_ranks):
    for m in MICROBATCHES:
        line = timeline("zb-h1", straight(num_ranks), m)
        assert peaks(line) == [min(num_ranks - rank, m) for rank in range(num_ranks)]
        assert [line.peak_deferred(rank) for rank in range(num_ranks)] == [
            min(rank + 1, m) for rank in range(num_ranks)
        ]


@pytest.mark.parametrize("num_ranks", range(2, 9))
def test_zero_bubble_is_shorter_than_1f1b_at_every_size(num_ranks):
    """A stage of ZB-V is half a stage."""
    for m in MICROBATCHES:
        plain = length("1f1b", straight(num_ranks), m)
        assert length("zb-h1", straight(num_ranks), m) < plain
        if m in FEW_MICROBATCHES:
            assert length("zb-v", v_shaped(num_ranks), m, forward=0.5, backward=1) < plain


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("transfer", [0, 0.1, 0.5])
@pytest.mark.parametrize("weight_share", [1 / 3, 0.4, 0.5, 0.6, 2 / 3])
def test_zb_h1_is_never_longer_than_1f1b(overlaps, transfer, weight_share):
    """Input gradients from half to twice as long as weight gradients, backwards from 1 to 3 forwards."""
    for backward, num_ranks, m in product((1, 2, 3), (2, 3, 6), (1, 2, 4, 9)):
        times = {"backward": backward, "weight_share": weight_share, "transfer": transfer, "overlaps": overlaps}
        plain, zero = (length(name, straight(num_ranks), m, **times) for name in ("1f1b", "zb-h1"))
        assert zero <= plain + 1e-9


@pytest.mark.parametrize("num_ranks", RANKS)
def test_zb_v_leaves_only_the_start_of_the_last_rank_idle(num_ranks):
    """The last rank starts after p - 1 passes and has 6 m; few microbatches wait for their own way back."""
    p = num_ranks
    for m in MICROBATCHES:
        assert length("zb-v", v_shaped(p), m) == max(p - 1 + 6 * m, 4 * (m + p) - 2)


def test_zb_v_is_longer_than_1f1b_where_nothing_hides_its_messages():
    """Half a percent, with 2 ranks, 16 microbatches, and messages of a fifth of a forward."""
    plain = length("1f1b", straight(2), 16, transfer=0.2)
    in_a_v = length("zb-v", v_shaped(2), 16, forward=0.5, backward=1, transfer=0.2)
    assert (plain, in_a_v) == (pytest.approx(54.4), pytest.approx(54.7))


HELD = {Phase.FORWARD: 1, Phase.INPUT_GRADIENT: 0, Phase.WEIGHT_GRADIENT: -1}


@pytest.mark.parametrize("num_ranks", RANKS)
def test_zb_v_holds_2_p_half_stages_at_most_weight_gradients_that_wait_included(num_ranks):
    for m in MICROBATCHES:
        line = timeline("zb-v", v_shaped(num_ranks), m)
        held = [list(accumulate(HELD[interval.compute.phase] for interval in row)) for row in line.ranks]
        assert max(map(max, held)) == min(2 * num_ranks, 2 * m)
        assert max(peaks(line)) <= min(2 * num_ranks, 2 * m)
        assert line.peak_deferred(0) == 1


@pytest.mark.parametrize("num_ranks", RANKS)
def test_forward_only_leaves_only_the_ends_idle(num_ranks):
    p = num_ranks
    for m, v in product(FEW_MICROBATCHES, (1, 2, 3)):
        rounds = m * v if m >= p else (v - 1) * p + m
        assert length("forward_only", looping(p, v), m) == rounds + p - 1
        # In a V the last rank starts after p - 1, does both chunks of all, and p - 1 stages follow.
        assert length("forward_only", v_shaped(p), m) == 2 * m + 2 * (p - 1)


def test_forward_only_holds_one_microbatch():
    assert peaks(timeline("forward_only", looping(4, 2), 8)) == [1] * 4


# Messages beside passes


def sends_under_way(program: Program, rank: int) -> int:
    """Most sends of a rank at one time that are launched and not awaited."""
    open_, most = set(), 0
    for instruction in program:
        if isinstance(instruction, Launch):
            open_ |= {t for t in instruction.transfers if t.source == rank}
            most = max(most, len(open_))
        elif isinstance(instruction, Await):
            open_ -= set(instruction.transfers)
    return most


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-h1", "zb-v", "forward_only"])
def test_buffers_of_sends_are_freed_soon(name):
    for num_ranks in (2, 4, 8):
        placement = placement_of(name, num_ranks, 2 if name in ("interleaved", "zb-v") else 1)
        for overlaps in (False, True):
            found = programs(name, placement, 32, overlaps=overlaps)
            assert max(sends_under_way(program, rank) for rank, program in enumerate(found)) <= 6


@lru_cache
def never_waiting_for_sends(name: str, placement: Placement, m: int, overlaps: bool) -> tuple[Program, ...]:
    """The programs with all awaits of sends at the end: no rank ever stands still for another's receive."""
    return tuple(
        _sends_last(program, rank) for rank, program in enumerate(programs(name, placement, m, overlaps=overlaps))
    )


def _sends_last(program: Program, rank: int) -> Program:
    sent = tuple(t for i in program if isinstance(i, Await) for t in i.transfers if t.source == rank)
    steps = [
        Await(tuple(t for t in i.transfers if t.target == rank)) if isinstance(i, Await) else i for i in program
    ]
    return (*steps, Await(sent))


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-h1", "zb-v"])
@pytest.mark.parametrize("overlaps", [False, True])
def test_no_rank_stands_still_for_the_receive_of_another(name, overlaps):
    """For passes of usual ratios; a send that is awaited too early costs up to 17 percent."""
    for num_ranks, m in product((2, 3, 5), (3, 8, 13)):
        placement = placement_of(name, num_ranks, 2 if name in ("interleaved", "zb-v") else 1)
        free = never_waiting_for_sends(name, placement, m, overlaps)
        for backward, share, transfer in ((2, 0.5, 0.1), (2, 0.3, 0), (2, 0.66, 0.1), (1.5, 0.5, 0.05)):
            durations = Durations.equal(
                placement.num_stages, forward=1, backward=backward, weight_share=share, transfer=transfer
            )
            bound = simulate(free, placement, durations).length
            found = programs(name, placement, m, overlaps=overlaps)
            assert simulate(found, placement, durations).length <= bound * 1.0001


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-h1", "zb-v"])
def test_overlapped_messages_are_never_slower_and_hide_where_there_is_time(name):
    for num_ranks, m in product((2, 4), (4, 8, 16)):
        placement = placement_of(name, num_ranks, 2 if name in ("interleaved", "zb-v") else 1)
        at_once, beside = (length(name, placement, m, transfer=0.25, overlaps=o) for o in (False, True))
        assert beside <= at_once
        assert beside < at_once or name == "1f1b"


def test_a_receive_is_launched_one_pass_before_it_is_needed():
    found = programs("1f1b", straight(2), 4, overlaps=True)[1]
    place = found.index(Compute(Phase.FORWARD, 2))
    before = found[: found.index(Compute(Phase.BACKWARD, 1))]
    assert place > len(before)
    assert any(isinstance(i, Launch) and any(t.microbatch == 2 for t in i.transfers) for i in before)


def test_messages_keep_the_order_in_which_they_are_sent_whatever_order_needs_them():
    """Rank 0 of a V sends hidden states before a gradient that rank 1 needs first."""
    found = programs("zb-v", v_shaped(2), 4)
    sent, received = (
        [t for i in program if isinstance(i, Launch) for t in i.transfers if (t.source, t.target) == (0, 1)]
        for program in found
    )
    used = [input_transfer(i, 1, v_shaped(2)) for i in found[1] if isinstance(i, Compute)]
    assert sent == received
    assert sent != [t for t in used if t and t.source == 0]
