"""The drawing, compared with one that was checked by hand."""

from megatron_bert_tp.pipeline.schedule import programs
from megatron_bert_tp.pipeline.simulate import Durations, simulate
from megatron_bert_tp.pipeline.timeline import draw

ONE_F_ONE_B = """\
stage 0 |0123......aa4bb5cc6dd7ee.ff.gg.hh| live 4
stage 1 |.012....aa3bb4cc5dd6ee7ff.gg.hh..| live 3
stage 2 |..01..aa2bb3cc4dd5ee6ff7gg.hh....| live 2
stage 3 |...0aa1bb2cc3dd4ee5ff6gg7hh......| live 1
length 33, idle 27.3%, 1 per column
0-9 forward, a-j backward of microbatch 0-9 (again from 10), . idle; live: most activations held"""


def drawing(name: str, num_stages: int, num_microbatches: int, *, width: int = 100) -> str:
    durations = Durations.equal(num_stages, forward=1, backward=2)
    return draw(simulate(programs(name, num_stages, num_microbatches), durations), width=width)


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
    rows = draw(simulate(programs("1f1b", 2, 1), durations)).splitlines()
    assert rows[:2] == ["stage 0 |0...aa| live 1", "stage 1 |.0aa..| live 1"]


def test_column_shows_the_pass_that_runs_in_its_middle() -> None:
    durations = Durations.equal(1, forward=2, backward=3)
    assert draw(simulate(programs("1f1b", 1, 2), durations)).startswith("stage 0 |0a1bb|")
