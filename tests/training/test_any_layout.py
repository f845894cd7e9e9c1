"""A checkpoint of any layout goes on at any other: the same numbers, the same place in the text, the same curve.

The files are read here without the package: safetensors' own reader, and offsets from the manifest's JSON.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.checkpoint.slices import Rectangle
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.training.build import build_pretrainer
from megatron_bert_tp.training.state import held_rectangles
from megatron_bert_tp.training.texts import open_texts
from tests.support import CPU, TIMEOUT, Layout, Recipe, build_mesh, with_dropout
from tests.test_layouts import name_of
from tests.trainers import CORPUS_SHAPE, configure, run, train

BEFORE, AFTER = 3, 5
SHAPE = with_dropout(replace(CORPUS_SHAPE, num_hidden_layers=4))
RECIPE = Recipe(shape=SHAPE, num_steps=BEFORE, rate=1e-4, final_rate=1e-4)
LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(pipeline=2),
    Layout(data=2),
    Layout(tensor=2, pipeline=2),
    Layout(tensor=2, data=2),
    Layout(pipeline=2, data=2),
    Layout(tensor=4),
    Layout(pipeline=2, schedule="interleaved", virtual=2),
    Layout(data=2, shards=True),
    Layout(tensor=2, data=2, shards=True),
    Layout(pipeline=2, data=2, shards=True),
    Layout(pipeline=2, data=2, schedule="interleaved", virtual=2, shards=True),
]


def whole_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, put together by hand."""
    rows = json.loads((checkpoint / "manifest.json").read_text())["slices"]
    files = {name: load_file(checkpoint / name) for name in {row["file"] for row in rows}}
    tensors: dict[str, torch.Tensor] = {}
    for row in rows:
        piece = files[row["file"]][row["name"]]
        whole = tensors.setdefault(row["name"], torch.full(row["shape"], torch.nan, dtype=piece.dtype))
        whole[tuple(slice(o, o + e) for o, e in zip(row["offsets"], row["extent"], strict=True))] = piece
    return tensors


def window(held: Rectangle) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(held.offsets, held.tensor.shape, strict=True))


def go_on(settings: Path, layout: Layout, folders: list[Path]) -> list[tuple[list[str], int, list[float]]]:
    """Of this rank, for each checkpoint: tensors that are not the file's, samples done, and the next losses."""
    config = configure(settings, replace(RECIPE, num_steps=BEFORE + AFTER), layout)
    mesh, agreement = build_mesh(layout), Agreement.of_world(TIMEOUT)
    results = []
    for folder in folders:
        truth = whole_tensors(folder)
        texts = open_texts(config, mesh.data, say=lambda _: None)
        trainer = build_pretrainer(
            config, mesh, texts, agreement=agreement, device=CPU, checkpoint=Checkpoint.open(folder)
        )
        held = held_rectangles(trainer.chunks, trainer.updater, "adamw", mesh)
        wrong = [each.name for each in held if not torch.equal(each.tensor, truth[each.name][window(each)])]
        assert mesh.data.rank > 0 or held, "the first replica holds something"
        samples = trainer.samples_done
        results.append((wrong, samples, [trainer.train_step().losses.loss for _ in range(AFTER)]))
    return results


@pytest.fixture(scope="module")
def curve(ranks, data) -> list[float]:
    """One process, uninterrupted."""
    (steps,) = ranks.run(1, train, data, replace(RECIPE, num_steps=BEFORE + AFTER), Layout())
    return [step.losses.loss for step in steps][BEFORE:]


@pytest.fixture(scope="module")
def saved(ranks, data, tmp_path_factory) -> list[Path]:
    """A checkpoint of each layout after three steps."""
    root = tmp_path_factory.mktemp("saved")
    for layout in LAYOUTS:
        folder = f"run.directory={root / name_of(layout)}"
        ranks.run(layout.world, run, data, RECIPE, layout, folder, "run.evaluation_samples=0")
    return [root / name_of(layout) / "checkpoints" / f"step_{BEFORE:08d}" for layout in LAYOUTS]


def assert_goes_on(ranks, data, curve, layout, sources, checkpoints):
    batch = configure(data, RECIPE, layout).optimizer.global_batch
    for answers in ranks.run(layout.world, go_on, data, layout, checkpoints):
        for source, (wrong, samples, losses) in zip(sources, answers, strict=True):
            assert wrong == [], name_of(source)
            assert samples == BEFORE * batch
            # Float64, sums in another order; tests/test_layouts.py has the same bound.
            assert losses == pytest.approx(curve, rel=1e-9, abs=0), name_of(source)


@pytest.mark.parametrize("place", range(0, len(LAYOUTS), 2), ids=lambda place: name_of(LAYOUTS[place]))
def test_checkpoints_of_some_layouts_go_on_here(ranks, data, saved, curve, place):
    """Sources in a circle, so that each target has its own two."""
    sources = [(place + 3) % len(LAYOUTS), (place + 8) % len(LAYOUTS)]
    layouts, checkpoints = [LAYOUTS[n] for n in sources], [saved[n] for n in sources]
    assert_goes_on(ranks, data, curve, LAYOUTS[place], layouts, checkpoints)


@pytest.mark.faults
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_checkpoints_of_all_layouts_go_on_here(ranks, data, saved, curve, layout):
    assert_goes_on(ranks, data, curve, layout, LAYOUTS, saved)
