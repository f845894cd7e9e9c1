"""20 steps equal 10, a resume, and 10 more: bit for bit at the same layout."""

import re
from dataclasses import replace

import pytest
import torch

from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.errors import ExitCode
from tests.comparison import is_key_bias, relative_errors
from tests.support import Layout, Recipe
from tests.trainers import CORPUS_SHAPE, run
from tests.training.runs import pretrain, records, succeeded, without_times

KINDS = ("weight", "exp_avg", "exp_avg_sq")
RECIPE = Recipe(shape=CORPUS_SHAPE, num_steps=6, final_rate=0.0, clip_norm=0.5)
ALLOWED = "run.allow_changes=true"
SAME_LAYOUT = ("parallel.tensor=2", "parallel.pipeline=2")


def tensors(checkpoint):
    return {
        f"{kind}/{name}": checkpoint.read(f"{kind}/{name}", (0,) * len(shape), shape)
        for kind in KINDS
        for name, shape in checkpoint.shapes(kind).items()
    }


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(data, finished_run, tmp_path):
    middle = finished_run / "checkpoints" / "step_00000010"
    # An epoch has about 40 samples: 10 steps of 8 end inside the second, 20 inside a later one.
    resumed = tmp_path / "resumed"
    output = succeeded(
        pretrain(data, f"run.directory={resumed}", f"run.resume={middle}", *SAME_LAYOUT, processes=4)
    )
    assert "step 10" in output
    assert without_times(records(resumed, "step")) == without_times(records(finished_run, "step"))[10:]
    assert records(resumed, "evaluation") == records(finished_run, "evaluation")[1:]
    whole, again = tensors(Checkpoint.open(finished_run)), tensors(Checkpoint.open(resumed))
    assert whole.keys() == again.keys()
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


def run_through_and_resumed(ranks, settings, folder, recipe: Recipe, layout: Layout, other: Layout):
    """Ends of a run of 6 steps at ``layout``, and of one that goes on from its third step at ``other``."""
    quiet = ["run.save_every=3", "run.evaluation_samples=0"]
    whole, resumed = folder / "whole", folder / "resumed"
    ranks.run(layout.world, run, settings, recipe, layout, f"run.directory={whole}", *quiet)
    middle = f"run.resume={whole}/checkpoints/step_00000003"
    ranks.run(other.world, run, settings, recipe, other, f"run.directory={resumed}", middle, *quiet)
    assert [row["step"] for row in records(resumed, "step")] == [4, 5, 6]
    return whole, resumed


def test_data_ranks_resume_bit_for_bit(ranks, data, tmp_path):
    recipe, layout = replace(RECIPE, dtype=torch.float32), Layout(data=2)
    whole, resumed = run_through_and_resumed(ranks, data, tmp_path, recipe, layout, layout)
    assert without_times(records(resumed, "step")) == without_times(records(whole, "step"))[3:]
    truth, found = tensors(Checkpoint.open(whole)), tensors(Checkpoint.open(resumed))
    assert truth.keys() == found.keys()
    assert [name for name in truth if not torch.equal(truth[name], found[name])] == []


@pytest.mark.parametrize("other", [Layout(pipeline=2, tensor=2), Layout(data=4)], ids=str)
def test_a_run_of_four_ranks_goes_on_at_another_layout_of_four(ranks, data, tmp_path, other):
    layout = Layout(data=2, tensor=2)
    truth, found = map(Checkpoint.open, run_through_and_resumed(ranks, data, tmp_path, RECIPE, layout, other))
    # As in tests/test_layouts.py: sums of float64 in another order, and a gradient that is rounding alone.
    for kind in KINDS:
        pair = [{name: t for name, t in tensors(c).items() if name.startswith(f"{kind}/")} for c in (found, truth)]
        errors = relative_errors(*pair)
        assert {name: e for name, e in errors.items() if e > 1e-9 and not is_key_bias(name)} == {}


def test_a_run_with_relative_positions_goes_on_though_absolute_ones_are_never_trained(ranks, data, tmp_path):
    """Their embedding has no gradient, so no moments, and yet a checkpoint has every tensor of the model."""
    recipe = replace(RECIPE, shape=replace(CORPUS_SHAPE, position_embedding_type="relative_key"))
    layouts = Layout(pipeline=2), Layout(tensor=2)
    truth, found = map(Checkpoint.open, run_through_and_resumed(ranks, data, tmp_path, recipe, *layouts))
    pair = [tensors(checkpoint) for checkpoint in (found, truth)]
    assert pair[0].keys() == pair[1].keys()
    assert "weight/bert.embeddings.position_embeddings.weight" in pair[0]
    errors = relative_errors(*pair)
    assert {name: e for name, e in errors.items() if e > 1e-9 and not is_key_bias(name)} == {}


def test_the_resume_point_lies_inside_an_epoch(data):
    # Guards the test above: 80 and 160 samples must not be whole epochs.
    from megatron_bert_tp.config.load import load_config
    from megatron_bert_tp.parallel.mesh import Axis
    from megatron_bert_tp.training.texts import open_texts

    num_samples = open_texts(load_config(data), Axis.alone("data"), say=print).source.num_samples_per_epoch
    assert num_samples < 80
    assert 80 % num_samples != 0
    assert 160 % num_samples != 0


def test_a_checkpoint_resumes_in_one_process_with_the_same_curve(data, finished_run, tmp_path):
    middle = finished_run / "checkpoints" / "step_00000010"
    alone = tmp_path / "alone"
    succeeded(pretrain(data, f"run.directory={alone}", f"run.resume={middle}"))
    for here, there in zip(records(alone, "step"), records(finished_run, "step")[10:], strict=True):
        assert here["samples"] == there["samples"]
        assert here["learning_rate"] == there["learning_rate"]
        # Rounding of float32 sums at another layout, 1e-7 a step relative, grown by ten AdamW steps of 1e-2.
        assert abs(here["loss"] - there["loss"]) < 1e-3


def test_a_resumed_run_with_another_global_batch_tells_what_it_will_read(data, finished_run, tmp_path):
    """80 samples in 10 steps of 8, then 10 steps of 2: more than 20 steps of 2 would have."""
    middle = finished_run / "checkpoints" / "step_00000010"
    output = succeeded(
        pretrain(data, f"run.directory={tmp_path}", f"run.resume={middle}", "optimizer.global_batch=2", ALLOWED)
    )
    assert "changed since then: optimizer.global_batch: 8 -> 2" in output
    assert records(tmp_path, "step")[-1]["samples"] == 100
    assert re.search(r"; 100 in the whole run, [\d.]+ epochs$", output, re.MULTILINE)
    assert "read: 20 samples (" in output


def test_a_finished_run_says_so_and_trains_no_further(data, finished_run):
    before = (finished_run / "metrics.jsonl").read_bytes()
    output = succeeded(pretrain(data, f"run.directory={finished_run}", *SAME_LAYOUT, processes=4))
    assert "already finished" in output
    assert (finished_run / "metrics.jsonl").read_bytes() == before


def test_records_after_the_checkpoint_are_cut_off_when_their_steps_run_again(tmp_path):
    from megatron_bert_tp.training.progress import MetricsFile, read_records

    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, steps_done=0)
    for step in range(1, 6):
        first.write({"kind": "step", "step": step})
    first.close()
    with path.open("a") as file:
        file.write('{"kind": "step", "st')
    second = MetricsFile(path, steps_done=3)
    second.write({"kind": "step", "step": 4})
    second.close()
    assert [record["step"] for record in read_records(path)] == [1, 2, 3, 4]


def test_a_changed_setting_is_refused_unless_it_is_allowed(data, finished_run, tmp_path):
    middle = finished_run / "checkpoints" / "step_00000010"
    done = pretrain(data, f"run.directory={tmp_path}", f"run.resume={middle}", "optimizer.learning_rate=2e-2")
    assert done.returncode == ExitCode.BAD_SETTINGS
    assert f"are not those of {middle}:\n  optimizer.learning_rate: 0.01 -> 0.02\nput them back" in done.stderr
    assert not (tmp_path / "metrics.jsonl").exists()


def test_never_refuses_to_replace_the_checkpoints_of_another_run(data, finished_run):
    done = pretrain(data, f"run.directory={finished_run}", "run.resume=never")
    assert done.returncode == ExitCode.BAD_CHECKPOINT
    assert "run.resume=auto" in done.stderr
