"""Where virtual stages live, and the messages between them."""

import pytest

from megatron_bert_tp.errors import ScheduleError
from megatron_bert_tp.pipeline.placement import Placement, looping, straight, v_shaped
from megatron_bert_tp.pipeline.schedule import Compute, Phase, Transfer, input_transfer, output_transfer

F, B, I, W = Phase  # noqa: E741


def test_placements_equal_their_drawings():
    assert straight(3).stages == ((0,), (1,), (2,))
    assert looping(3, 2).stages == ((0, 3), (1, 4), (2, 5))
    assert v_shaped(3).stages == ((0, 5), (1, 4), (2, 3))


@pytest.mark.parametrize("placement", [straight(4), looping(3, 4), v_shaped(5), looping(1, 1)])
def test_every_stage_has_one_place(placement):
    places = [placement.place_of(stage) for stage in range(placement.num_stages)]
    assert [placement.stages[rank][chunk] for rank, chunk in places] == list(range(placement.num_stages))
    assert len(set(places)) == placement.num_ranks * placement.num_chunks


@pytest.mark.parametrize(
    ("placement", "ends"),
    [(straight(4), (0, 3)), (looping(3, 2), (0, 2)), (v_shaped(3), (0,)), (straight(1), (0,))],
)
def test_ends_hold_the_first_and_the_last_stage(placement, ends):
    assert placement.ends == ends


@pytest.mark.parametrize("stages", [(), ((),), ((0,), (0,)), ((0,), (2,)), ((0, 1), (2,)), ((1,), (2,))])
def test_a_placement_with_holes_repeats_or_uneven_ranks_is_refused(stages):
    with pytest.raises(ScheduleError, match="equally many virtual stages on every rank, numbered from 0"):
        Placement(stages)


@pytest.mark.parametrize("build", [lambda: straight(0), lambda: looping(2, 0), lambda: v_shaped(0)])
def test_empty_placements_are_refused(build):
    with pytest.raises(ScheduleError, match=r"at least one of its .*, got 0"):
        build()


@pytest.mark.parametrize(
    ("placement", "rank", "compute", "needed", "given"),
    [
        (straight(3), 0, Compute(F, 5), None, Transfer(F, 5, 0, 0, 1)),
        (straight(3), 1, Compute(F, 5), Transfer(F, 5, 0, 0, 1), Transfer(F, 5, 0, 1, 2)),
        (straight(3), 2, Compute(F, 5), Transfer(F, 5, 0, 1, 2), None),
        (straight(3), 2, Compute(B, 5), None, Transfer(B, 5, 0, 2, 1)),
        (straight(3), 1, Compute(I, 5), Transfer(B, 5, 0, 2, 1), Transfer(B, 5, 0, 1, 0)),
        (straight(3), 1, Compute(W, 5), None, None),
        # Stage 2 of a loop of 3 goes on at rank 0 as its chunk 1, and the gradient comes back to chunk 0.
        (looping(3, 2), 2, Compute(F, 5), Transfer(F, 5, 0, 1, 2), Transfer(F, 5, 1, 2, 0)),
        (looping(3, 2), 0, Compute(F, 5, 1), Transfer(F, 5, 1, 2, 0), Transfer(F, 5, 1, 0, 1)),
        (looping(3, 2), 0, Compute(B, 5, 1), Transfer(B, 5, 1, 1, 0), Transfer(B, 5, 0, 0, 2)),
        # The point of a V hands over to itself.
        (v_shaped(3), 2, Compute(F, 5), Transfer(F, 5, 0, 1, 2), Transfer(F, 5, 1, 2, 2)),
        (v_shaped(3), 2, Compute(F, 5, 1), Transfer(F, 5, 1, 2, 2), Transfer(F, 5, 1, 2, 1)),
        (v_shaped(3), 2, Compute(I, 5, 1), Transfer(B, 5, 1, 1, 2), Transfer(B, 5, 0, 2, 2)),
        (v_shaped(3), 0, Compute(F, 5, 1), Transfer(F, 5, 1, 1, 0), None),
        (v_shaped(3), 0, Compute(I, 5, 1), None, Transfer(B, 5, 1, 0, 1)),
    ],
)
def test_what_a_pass_needs_and_gives(placement, rank, compute, needed, given):
    assert input_transfer(compute, rank, placement) == needed
    assert output_transfer(compute, rank, placement) == given
