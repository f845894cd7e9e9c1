"""Runs of the whole engine go on: masters, moments, counters and scale come back, at any layout."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_bert_tp.checkpoint.manifest import Manifest
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.errors import ExitCode
from tests.comparison import is_key_bias, relative_errors
from tests.support import Layout, Recipe
from tests.test_layouts import name_of
from tests.trainers import CORPUS_SHAPE, run
from tests.training.runs import pretrain, records, start, succeeded, without_times
from tests.training.test_resume import ALLOWED, KINDS, run_through_and_resumed, tensors

SHAPE = replace(CORPUS_SHAPE, num_hidden_layers=4)
RECIPE = Recipe(shape=SHAPE, num_steps=6, rate=1e-3, final_rate=0.0, clip_norm=0.5)
ENGINE = Layout(data=2, pipeline=2, tensor=2, schedule="zb-v", virtual=2, sequence=True, shards=True)
OTHERS = [
    Layout(data=4, shards=True),
    Layout(tensor=4),
    Layout(data=2, pipeline=2, schedule="interleaved", virtual=2),
    Layout(),
]
LAMB = "optimizer.name=lamb"


def middle_of(run_folder: Path) -> Path:
    return run_folder / "checkpoints" / "step_00000003"


def assert_equal_bits(found: Path, truth: Path) -> None:
    here, there = (tensors(Checkpoint.open(folder)) for folder in (found, truth))
    assert here.keys() == there.keys()
    assert [name for name in here if not torch.equal(here[name], there[name])] == []


def two_runs(ranks, data, folder, recipe, layout, other, *settings):
    """Folders of a run of six steps, and of one that goes on from its third at another layout."""
    quiet = ["run.save_every=3", "run.evaluation_samples=0", *settings]
    whole, resumed = folder / "whole", folder / "resumed"
    ranks.run(layout.world, run, data, recipe, layout, f"run.directory={whole}", *quiet)
    here = (f"run.directory={resumed}", f"run.resume={middle_of(whole)}")
    ranks.run(other.world, run, data, recipe, other, *here, *quiet)
    return whole, resumed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_whole_engine_goes_on_bit_for_bit(ranks, data, tmp_path, dtype):
    recipe = replace(RECIPE, dtype=dtype)
    whole, resumed = two_runs(ranks, data, tmp_path, recipe, ENGINE, ENGINE, LAMB)
    assert without_times(records(resumed, "step")) == without_times(records(whole, "step"))[3:]
    assert_equal_bits(resumed, whole)


@pytest.fixture(scope="module")
def lamb_run(ranks, data, tmp_path_factory) -> Path:
    """Six steps of LAMB in float64 on eight ranks, saved after the third."""
    folder = tmp_path_factory.mktemp("lamb")
    quiet = ("run.save_every=3", "run.evaluation_samples=0", LAMB)
    ranks.run(ENGINE.world, run, data, RECIPE, ENGINE, f"run.directory={folder}", *quiet)
    return folder


@pytest.mark.parametrize("other", OTHERS, ids=name_of)
def test_a_run_of_the_whole_engine_goes_on_at_another_layout(ranks, data, tmp_path, lamb_run, other):
    quiet = (f"run.directory={tmp_path}", f"run.resume={middle_of(lamb_run)}", "run.evaluation_samples=0", LAMB)
    ranks.run(other.world, run, data, RECIPE, other, *quiet)
    found, truth = (tensors(Checkpoint.open(folder)) for folder in (tmp_path, lamb_run))
    # As in tests/test_layouts.py: sums of float64 in another order, and a gradient that is rounding alone.
    for kind in KINDS:
        pair = [{name: t for name, t in each.items() if name.startswith(f"{kind}/")} for each in (found, truth)]
        errors = relative_errors(*pair)
        assert {name: e for name, e in errors.items() if e > 1e-9 and not is_key_bias(name)} == {}
    for here, there in zip(records(tmp_path, "step"), records(lamb_run, "step")[3:], strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-9, abs=0)


def test_the_loss_scale_and_the_number_of_updates_come_back(ranks, data, tmp_path):
    """At such a scale every step overflows; the first halving comes at the second."""
    recipe = replace(RECIPE, dtype=torch.float16)
    numbers = {"initial": 2.0**60, "hysteresis": 2, "growth_interval": 3, "minimum": 2.0**10}
    scale = [f"optimizer.loss_scale.{name}={value}" for name, value in numbers.items()]
    layout = Layout(data=2, tensor=2, shards=True)
    whole, resumed = two_runs(ranks, data, tmp_path, recipe, layout, layout, *scale)
    rows = records(whole, "step")
    assert [row["skipped"] for row in rows] == [1] * 6
    facts = Checkpoint.open(middle_of(whole)).facts
    assert facts["updates"] == 0
    assert facts["loss_scale"] == {
        "scale": 2.0**58, "good_steps": 0, "bad_steps_left": 0, "skipped_in_a_row": 3
    }  # fmt: skip
    assert without_times(records(resumed, "step")) == without_times(rows)[3:]
    assert [row["loss_scale"] for row in records(resumed, "step")] == [2.0**58, 2.0**57, 2.0**56]


def test_updates_after_skipped_steps_go_on_bit_for_bit(ranks, data, tmp_path):
    recipe = replace(RECIPE, dtype=torch.float16)
    layout = Layout(pipeline=2)
    whole, resumed = two_runs(
        ranks, data, tmp_path, recipe, layout, layout, f"optimizer.loss_scale.initial={2.0**19}",
        "optimizer.loss_scale.hysteresis=1",
    )  # fmt: skip
    num_skipped = sum(row["skipped"] for row in records(whole, "step")[:3])
    assert 0 < num_skipped < 3, "guards the test: some steps are skipped, and not all"
    assert Checkpoint.open(middle_of(whole)).facts["updates"] == 3 - num_skipped
    assert without_times(records(resumed, "step")) == without_times(records(whole, "step"))[3:]
    assert_equal_bits(resumed, whole)


def test_a_checkpoint_of_another_rule_is_refused_with_the_way_out(data, finished_run, tmp_path):
    middle = finished_run / "checkpoints" / "step_00000010"
    done = pretrain(data, f"run.directory={tmp_path}", f"run.resume={middle}", "optimizer.name=sgd", ALLOWED)
    assert done.returncode == ExitCode.BAD_CHECKPOINT
    assert "Traceback" not in done.stderr
    assert f"{middle}: holds no momentum_buffer" in done.stderr
    assert "start a new run from its weights with model.weights=" in done.stderr
    given = (f"run.directory={tmp_path}/new", f"model.weights={middle}", "optimizer.name=sgd", "optimizer.steps=4")
    succeeded(pretrain(data, *given))


def test_a_checkpoint_from_before_updates_were_counted_still_loads(ranks, data, tmp_path):
    recipe, layout = replace(RECIPE, dtype=torch.float32), Layout(pipeline=2)
    whole, resumed = run_through_and_resumed(ranks, data, tmp_path, recipe, layout, layout)
    path = middle_of(whole) / "manifest.json"
    manifest = Manifest.read(path)
    facts = {name: value for name, value in manifest.facts.items() if name != "updates"}
    assert len(facts) == len(manifest.facts) - 1
    path.write_text(replace(manifest, facts=facts).dump(), encoding="utf-8")
    again = f"run.directory={tmp_path}/again", f"run.resume={middle_of(whole)}", "run.evaluation_samples=0"
    ranks.run(layout.world, run, data, recipe, layout, *again)
    assert_equal_bits(tmp_path / "again", resumed)


def test_files_of_a_bfloat16_run_hold_float32_and_are_exported(ranks, data, tmp_path):
    recipe = replace(RECIPE, dtype=torch.bfloat16, num_steps=3)
    folder = tmp_path / "run"
    quiet = (f"run.directory={folder}", "run.evaluation_samples=0")
    ranks.run(ENGINE.world, run, data, recipe, ENGINE, *quiet)
    checkpoint = Checkpoint.open(folder)
    assert {row.dtype for row in checkpoint.manifest.slices} == {"float32"}
    shapes = checkpoint.shapes("weight")
    weights = {name: checkpoint.weight(name, (0,) * len(shape), shape) for name, shape in shapes.items()}
    # More digits than bfloat16 has: masters, not parameters that were widened.
    fine = [name for name, weight in weights.items() if not torch.equal(weight, weight.bfloat16().float())]
    assert len(fine) > len(weights) / 2
    succeeded(start("megatron_bert_tp.convert", "to-hf", folder, tmp_path / "exported"))
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["architectures"]
    shared = exported.keys() & weights.keys()
    assert len(shared) > 0.9 * len(weights)
    assert all(torch.equal(exported[name], weights[name]) for name in shared)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_run_goes_on_in_another_precision(ranks, data, tmp_path, dtype):
    there, here = replace(RECIPE, dtype=torch.float32), replace(RECIPE, dtype=dtype)
    quiet = ("run.save_every=3", "run.evaluation_samples=0")
    for source, first, second in (("up", here, there), ("down", there, here)):
        whole, resumed = tmp_path / source, tmp_path / f"{source}-resumed"
        ranks.run(1, run, data, first, Layout(), f"run.directory={whole}", *quiet)
        given = (f"run.directory={resumed}", f"run.resume={middle_of(whole)}", *quiet)
        ranks.run(1, run, data, second, Layout(), *given, ALLOWED)
        for ours, theirs in zip(records(resumed, "step"), records(whole, "step")[3:], strict=True):
            # As in tests/test_precision_layouts.py: four unit roundoffs of bfloat16.
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=2.0**-6)
            assert ours["loss_scale"] == (65536 if second.dtype is torch.float16 else 1)
