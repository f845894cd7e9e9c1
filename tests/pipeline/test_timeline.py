"""The drawing, compared with one that was checked by hand."""

import re

import pytest

from megatron_bert_tp.pipeline.placement import straight
from megatron_bert_tp.pipeline.schedule import SCHEDULES, placement_of, programs
from megatron_bert_tp.pipeline.schedule_file import read_schedule
from megatron_bert_tp.pipeline.simulate import Durations, simulate
from megatron_bert_tp.pipeline.timeline import draw
from tests.sources import ROOT, fenced_block

ONE_F_ONE_B = """\
stage 0 |0123......aa4bb5cc6dd7ee.ff.gg.hh| live 4
stage 1 |.012....aa3bb4cc5dd6ee7ff.gg.hh..| live 3
stage 2 |..01..aa2bb3cc4dd5ee6ff7gg.hh....| live 2
stage 3 |...0aa1bb2cc3dd4ee5ff6gg7hh......| live 1
length 33, idle 27.3%, 1 per column
0-9 forward, a-j backward of microbatch 0-9 (again from 10), . idle; live: most activations held"""


def drawing(name: str, num_ranks: int, num_microbatches: int, *, num_virtual: int = 1, width: int = 100) -> str:
    placement = placement_of(name, num_ranks, num_virtual)
    durations = Durations.equal(placement.num_stages, forward=1, backward=2)
    return draw(simulate(programs(name, placement, num_microbatches), placement, durations), width=width)


def test_one_f_one_b_of_four_stages_and_eight_microbatches_is_drawn_as_by_hand() -> None:
    assert drawing("1f1b", 4, 8) == ONE_F_ONE_B


def test_long_timelines_are_squeezed_into_the_width() -> None:
    rows = drawing("1f1b", 8, 64, width=80).splitlines()[:8]
    assert max(map(len, rows)) <= 80
    assert len(set(map(len, rows))) == 1


def test_microbatches_from_ten_on_begin_again_at_zero() -> None:
    assert drawing("gpipe", 1, 11).startswith("stage 0 |01234567890aabb")


def test_column_is_as_long_as_the_shortest_pass() -> None:
    durations = Durations.equal(2, forward=10, backward=20)
    rows = draw(simulate(programs("1f1b", straight(2), 1), straight(2), durations)).splitlines()
    assert rows[:2] == ["stage 0 |0...aa| live 1", "stage 1 |.0aa..| live 1"]


def test_column_shows_the_pass_that_runs_in_its_middle() -> None:
    durations = Durations.equal(1, forward=2, backward=3)
    assert draw(simulate(programs("1f1b", straight(1), 2), straight(1), durations)).startswith("stage 0 |0a1bb|")


ZB_H1 = """\
stage 0 |012..aA3bB4cCdDeE| live 3, waiting 1
stage 1 |.01.a2bA3cB4dCeDE| live 2, waiting 2
stage 2 |..0a1b2cA3dB4eCDE| live 1, waiting 3
length 17, idle 11.8%, 1 per column
0-9 forward, a-j backward of microbatch 0-9 (again from 10), . idle; live: most activations held
a-j input gradient alone, A-J weight gradient; waiting: most weight gradients put off"""
INTERLEAVED = """\
rank 0 |0101..aa.bbaabb| live 4
       |0011..11.110000|
rank 1 |.010aa1bbaabb..| live 3
       |.001111110000..|
length 15, idle 20.0%, 1 per column
0-9 forward, a-j backward of microbatch 0-9 (again from 10), . idle; live: most activations held
second line of a rank: the chunk that the pass belongs to"""


def test_weight_gradients_are_drawn_as_capitals_as_by_hand():
    assert drawing("zb-h1", 3, 5) == ZB_H1


def test_chunks_are_drawn_below_their_passes_as_by_hand():
    assert drawing("interleaved", 2, 2, num_virtual=2) == INTERLEAVED


def test_chunks_and_weight_gradients_are_explained_together():
    assert drawing("zb-v", 2, 3, num_virtual=2).splitlines()[-2:] == [
        "a-j input gradient alone, A-J weight gradient; waiting: most weight gradients put off",
        "second line of a rank: the chunk that the pass belongs to",
    ]


PAGE = (ROOT / "docs" / "schedules.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_drawings_of_the_page_are_those_of_the_schedules(name):
    num_virtual = SCHEDULES[name].num_virtual or 2
    assert fenced_block(PAGE, f"schedule {name}") == drawing(name, 4, 8, num_virtual=num_virtual) + "\n"


def test_the_schedule_file_of_the_page_can_be_read(tmp_path):
    path = tmp_path / "own.schedule"
    path.write_text(re.search(r"^```\n(# two ranks.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)[1])
    assert read_schedule(path).num_microbatches == 4
