"""Number formats: float32 to the letter of the promise, 16 bits beside it, and pipelines bit for bit in each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from megatron_bert_tp.parallel.ownership import is_master
from tests.comparison import join_steps
from tests.support import Layout, Recipe
from tests.test_layouts import name_of
from tests.trainers import CORPUS_SHAPE, configure, train, trainer_of

SHAPE = replace(CORPUS_SHAPE, num_hidden_layers=4)
LONG = Recipe(shape=SHAPE, dtype=torch.float32, num_steps=50, rate=1e-3, final_rate=0.0, clip_norm=1.0)
SHORT = replace(LONG, num_steps=24)
# The promise for 50 steps in float32. Measured: 5e-7 at most.
PROMISED = 1e-4
# Unit roundoffs: a loss is off by a few of them, as a mean of logits that are rounded several times. Measured:
# up to 1.7 at this rate, in one process and in every layout; the loss falls by a hundred or more.
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
MOST_ROUNDOFFS = 4
EVERYTHING = Layout(data=2, pipeline=2, tensor=2, schedule="interleaved", virtual=2, sequence=True, shards=True,
                    overlaps=True, recompute="selective", packing="packed")  # fmt: skip
ZERO_BUBBLE = Layout(data=2, pipeline=2, tensor=2, schedule="zb-v", virtual=2, sequence=True, shards=True)
LAYOUTS = [
    EVERYTHING,
    ZERO_BUBBLE,
    Layout(tensor=4, sequence=True),
    Layout(pipeline=2, schedule="zb-v", virtual=2),
    Layout(data=4, shards=True),
]
QUICK = (EVERYTHING, Layout(pipeline=2, schedule="zb-v", virtual=2))
NARROW_LAYOUTS = [EVERYTHING, ZERO_BUBBLE, Layout(tensor=2, sequence=True), Layout(data=4, shards=True)]
PIPELINES = [
    Layout(pipeline=2, schedule="gpipe"),
    Layout(pipeline=4),
    Layout(pipeline=2, schedule="interleaved", virtual=2, overlaps=True),
    Layout(pipeline=4, schedule="zb-h1"),
    Layout(pipeline=2, schedule="zb-v", virtual=2, recompute="full"),
]


@dataclass(frozen=True)
class Curve:
    """Losses of the steps of one rank, and how its parameters stand to the float32 weights."""

    losses: tuple[float, ...]
    num_masters: int
    are_rounded: bool
    have_more_digits: bool


def curve(settings: Path, recipe: Recipe, layout: Layout) -> Curve:
    """A function that the pool runs."""
    # Fewer messages: more samples at once do not change a curve.
    larger = ["parallel.microbatch=4"] if layout.tensor == 4 else []
    trainer = trainer_of(configure(settings, recipe, layout, *larger), layout)
    losses = []
    for _ in range(recipe.num_steps):
        report = trainer.train_step()
        assert not report.update.is_skipped
        losses.append(report.losses.loss)
    masters = [each for each in trainer.updater.weights.owned if is_master(each) and each.weight.numel()]
    views = [(each.weight, each.part.view(each.part.parameter.detach())) for each in masters]
    return Curve(
        tuple(losses),
        len(masters),
        all(torch.equal(view, weight.to(view.dtype)) for weight, view in views),
        any(not torch.equal(view.float(), weight) for weight, view in views),
    )


@pytest.fixture(scope="module")
def curve_of(ranks, data):
    """The curve of a recipe at a layout, computed once; all ranks must report the same losses."""
    known: dict[tuple[Recipe, Layout], Curve] = {}

    def curve_of(recipe: Recipe, layout: Layout) -> Curve:
        if (recipe, layout) not in known:
            found = ranks.run(layout.world, curve, data, recipe, layout)
            assert len({each.losses for each in found}) == 1
            narrow = recipe.dtype in ROUNDOFF
            assert all((each.num_masters > 0) == narrow and each.are_rounded for each in found)
            assert all(each.have_more_digits == narrow for each in found)
            known[recipe, layout] = found[0]
        return known[recipe, layout]

    return curve_of


def distance(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(here - there) for here, there in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, id=name_of(layout), marks=() if layout in QUICK else pytest.mark.slow)
        for layout in LAYOUTS
    ],
)
def test_fifty_steps_in_float32_stay_within_a_ten_thousandth(curve_of, layout):
    truth = curve_of(LONG, Layout()).losses
    assert truth[0] - truth[-1] > 0.3, "guards the comparison: it learns"
    assert distance(curve_of(LONG, layout).losses, truth) < PROMISED


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, id=name_of(layout), marks=pytest.mark.slow if layout == ZERO_BUBBLE else ())
        for layout in (Layout(), *NARROW_LAYOUTS)
    ],
)
@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
def test_sixteen_bits_follow_the_float32_curve_at_every_layout(curve_of, layout, dtype):
    narrow = replace(SHORT, dtype=dtype)
    truth, alone = curve_of(SHORT, Layout()).losses, curve_of(narrow, Layout()).losses
    found = curve_of(narrow, layout).losses
    bound = MOST_ROUNDOFFS * ROUNDOFF[dtype]
    assert distance(found, truth) < bound
    assert distance(found, alone) < bound
    assert found != truth, "guards the comparison: these are other numbers"
    assert truth[0] - truth[-1] > 10 * bound


@pytest.mark.parametrize("layout", PIPELINES, ids=name_of)
@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
def test_a_pipeline_alone_follows_one_process_bit_for_bit(ranks, data, layout, dtype):
    recipe = replace(SHORT, dtype=dtype, num_steps=3)
    found, truth = (join_steps(ranks.run(each.world, train, data, recipe, each)) for each in (layout, Layout()))
    for ours, theirs in zip(found, truth, strict=True):
        assert (ours.losses, ours.norm) == (theirs.losses, theirs.norm)
        for name, gradient in theirs.gradients.items():
            assert torch.equal(ours.gradients[name], gradient), name
            assert torch.equal(ours.weights[name], theirs.weights[name]), name
