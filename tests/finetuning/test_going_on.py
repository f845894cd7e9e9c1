"""Runs that are ended and started again, that are over, and that try several seeds."""

import os
import shutil
import signal
import statistics
import sys

import pytest
import torch

from megatron_bert_tp.config.task_table import Kind
from megatron_bert_tp.errors import ExitCode
from tests.faults.runs import Running, outcome_of, tensors_of
from tests.finetuning.runs import (
    FINETUNE,
    assert_same_bits,
    evaluations_of,
    exported,
    layout_settings,
    losses_of,
    name_of,
    predictions_of,
    products_of,
    read_json,
    result_of,
    run_rank,
    tune,
)
from tests.support import Layout
from tests.training.runs import ROOT, records, start, succeeded

LONG = "optimizer.precision=float32", "optimizer.steps=60", "run.evaluate_every=10", "run.save_every=7"
DROPOUT = "model.hidden_dropout_prob=0.1", "model.attention_probs_dropout_prob=0.1"
# So small that no answer changes, and so the first evaluation stays the best.
STANDSTILL = "optimizer.learning_rate=1e-7", "run.evaluate_every=2", "run.save_every=2", "optimizer.steps=12"


def launched(settings, folder, *overrides, processes=1):
    launcher = ["torch.distributed.run", f"--nproc_per_node={processes}", "-m"] if processes > 1 else []
    line = [sys.executable, "-m", *launcher, FINETUNE, str(settings), f"run.directory={folder}", *overrides]
    return Running(line, folder, {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="module")
def undisturbed_of(ranks, files_of, tmp_path_factory):
    """Folder of a run that nothing disturbs, by its layout."""
    known = {}

    def undisturbed_of(layout):
        if layout not in known:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            known[layout] = tune(ranks, files_of(Kind.TAGS).settings, folder, *LONG, *DROPOUT, layout=layout)
        return known[layout]

    return undisturbed_of


@pytest.mark.parametrize(
    ("number", "layout"),
    [
        pytest.param(signal.SIGTERM, Layout(), marks=pytest.mark.slow),
        (signal.SIGKILL, Layout()),
        pytest.param(signal.SIGTERM, Layout(pipeline=2), marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, Layout(data=2, shards=True), marks=pytest.mark.slow),
    ],
    ids=name_of,
)
def test_a_run_that_was_ended_goes_on_to_the_same_bits(files_of, undisturbed_of, tmp_path, number, layout):
    settings, folder = files_of(Kind.TAGS).settings, tmp_path / "run"
    given = (*LONG, *DROPOUT, *layout_settings(layout))
    with launched(settings, folder, *given, processes=layout.world) as running:
        running.wait_for_step(15)
        running.send(number)
        running.end()
    assert not (folder / "result.json").exists()
    if number is signal.SIGTERM:
        assert outcome_of(folder)["code"] == ExitCode.STOPPED
    assert 15 <= len(losses_of(folder)) < 60, "it was ended in the middle"
    succeeded(start(FINETUNE, settings, f"run.directory={folder}", *given, processes=layout.world))
    truth = undisturbed_of(layout)
    assert losses_of(folder) == losses_of(truth)
    assert evaluations_of(folder) == evaluations_of(truth)
    assert products_of(folder) == products_of(truth)


def snapshot(folder):
    """All files of a run but how it ended, with their times."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("exit.json",) and "lock" not in path.name
    }


def test_several_seeds_are_trained_in_turn_and_summed_up(ranks, files_of, tmp_path):
    settings, folder = files_of(Kind.NUMBER).settings, tmp_path / "run"
    short = "optimizer.steps=6", "run.evaluate_every=3"
    tune(ranks, settings, folder, *short, "run.seeds=[1, 2, 5]")
    assert {path.name for path in folder.glob("seed_*")} == {"seed_1", "seed_2", "seed_5"}
    results = [result_of(folder / f"seed_{seed}") for seed in (1, 2, 5)]
    summary = read_json(folder / "summary.json")
    assert summary["seeds"] == {str(result["seed"]): result for result in results}
    for name, row in summary["validation"].items():
        values = [result["metrics"]["validation"][name] for result in results]
        assert len(set(values)) == 3, "another seed is another run"
        assert row == {"median": statistics.median(values), "least": min(values), "most": max(values)}
    assert set(summary["validation"]) == {"pearson", "spearman"}

    alone = tune(ranks, settings, tmp_path / "alone", *short, "optimizer.seed=2")
    assert result_of(alone) == results[1]
    assert_same_bits(exported(alone), exported(folder / "seed_2"))

    before = snapshot(folder)
    again = f"run.directory={folder}", *short, "run.seeds=[1, 2, 5]"
    (told,) = ranks.run(1, run_rank, "finetune", settings, again)
    assert [line for line in told.splitlines() if "finished" in line] == [
        f"{folder}/seed_{seed}: is already finished" for seed in (1, 2, 5)
    ]
    after = snapshot(folder)
    assert {name for name in before if before[name] != after[name]} <= {"summary.json"}
    assert before["summary.json"][1] == after["summary.json"][1]
    assert before.keys() == after.keys()


def test_a_seed_more_trains_that_one_alone(ranks, files_of, tmp_path):
    settings, folder = files_of(Kind.NUMBER).settings, tmp_path / "run"
    short = "optimizer.steps=2", "run.evaluate_every=2"
    tune(ranks, settings, folder, *short, "run.seeds=[1]")
    before = snapshot(folder / "seed_1")
    tune(ranks, settings, folder, *short, "run.seeds=[1, 2]")
    assert snapshot(folder / "seed_1") == before
    assert set(read_json(folder / "summary.json")["seeds"]) == {"1", "2"}


@pytest.fixture(scope="module")
def patient(ranks, files_of, tmp_path_factory):
    """Folder of a run that is over after two evaluations that are no better than the first."""
    folder = tmp_path_factory.mktemp("patient") / "run"
    given = (*STANDSTILL, "run.patience=2", "run.keep_last=1", "run.metric=accuracy")
    return tune(ranks, files_of(Kind.CLASS).settings, folder, *given), given


def test_patience_ends_a_run_and_the_best_checkpoint_outlives_it(patient):
    """Evaluations after steps 2, 4 and 6; the last checkpoint alone is kept, and the best."""
    folder, _ = patient
    assert [(row["step"], row["is_best"]) for row in evaluations_of(folder)] == [(2, 1), (4, 0), (6, 0)]
    assert len(losses_of(folder)) == 6
    assert result_of(folder)["best_step"] == 2
    kept = {path.name for path in (folder / "checkpoints").glob("step_*")}
    assert kept == {"step_00000002", "step_00000006"}


def test_the_export_is_the_best_checkpoint_and_not_the_last(patient):
    folder, _ = patient
    best, last = (tensors_of(folder, step) for step in (2, 6))
    found = {f"weight/{name}": value for name, value in exported(folder).items()}
    assert_same_bits(found, {name: best[name] for name in found})
    assert any(not (found[name] == last[name]).all() for name in found)


@pytest.mark.parametrize("is_told", [True, False], ids=["finished", "result lost"])
def test_a_run_that_lost_patience_is_not_gone_on_with(ranks, files_of, patient, tmp_path, is_told):
    folder, given = patient
    again = tmp_path / "run"
    shutil.copytree(folder, again)
    if not is_told:
        (again / "result.json").unlink()
        shutil.rmtree(again / "model")
        (again / "predictions.validation.jsonl").unlink()
    tune(ranks, files_of(Kind.CLASS).settings, again, *given)
    assert losses_of(again) == losses_of(folder)
    assert len(records(again, "evaluation")) == 3
    assert result_of(again) == result_of(folder)
    assert predictions_of(again) == predictions_of(folder)
    assert_same_bits(exported(again), exported(folder))


def test_a_run_without_validation_exports_its_last_step(ranks, files_of, tmp_path):
    given = "data.validation=null", "run.evaluate_every=null", "optimizer.steps=3", "optimizer.precision=float32"
    folder = tune(ranks, files_of(Kind.CLASS).settings, tmp_path / "run", *given)
    result = result_of(folder)
    assert (result["best_step"], result["metrics"]) == (3, {})
    last = tensors_of(folder, 3)
    found = {f"weight/{name}": value for name, value in exported(folder).items()}
    assert_same_bits(found, {name: last[name] for name in found})


def test_a_run_that_is_made_longer_exports_and_measures_anew(ranks, files_of, tmp_path):
    settings, folder = files_of(Kind.NUMBER).settings, tmp_path / "run"
    given = "optimizer.schedule=constant", "run.evaluate_every=20", "optimizer.precision=float32"
    tune(ranks, settings, folder, *given, "optimizer.steps=3")
    first, before = result_of(folder), exported(folder)
    tune(ranks, settings, folder, *given, "optimizer.steps=20", "run.allow_changes=true", "run.metric=spearman")
    second = result_of(folder)
    assert len(losses_of(folder)) == 20
    best = max(evaluations_of(folder), key=lambda row: row["spearman"])
    assert second["best_step"] == best["step"]
    assert second["metrics"]["validation"]["spearman"] == pytest.approx(best["spearman"], abs=1e-6)
    weights = tensors_of(folder, second["best_step"])
    found = exported(folder)
    assert_same_bits({f"weight/{name}": value for name, value in found.items()},
                     {f"weight/{name}": weights[f"weight/{name}"] for name in found})  # fmt: skip
    if second["best_step"] != first["best_step"]:
        assert any(not torch.equal(found[name], before[name]) for name in found)


def test_the_same_settings_over_other_data_are_not_finished(ranks, small_model, tmp_path):
    settings = tmp_path / "task.yaml"
    path = tmp_path / "train.csv"
    settings.write_text(
        f"""
model: {{weights: "{small_model}"}}
task: {{name: classification}}
data: {{train: "{path}", sequence_length: 16}}
optimizer: {{global_batch: 2, steps: 1}}
parallel: {{microbatch: 2}}
run: {{directory: "{tmp_path}/unused", device: cpu}}
"""
    )
    path.write_text("text,label\na film,x\nthe time,y\n")
    folder = tune(ranks, settings, tmp_path / "run")
    before = result_of(folder)
    path.write_text("text,label\na film,x\nno time,y\n")
    with pytest.raises(AssertionError, match="data"):
        tune(ranks, settings, folder)
    assert result_of(folder) == before
