"""Files whose content has changed in place, and what an earlier start has left in the folder."""

import json
import shutil

import pytest
import torch

from megatron_bert_tp.config.task_table import Kind
from megatron_bert_tp.errors import ExitCode
from megatron_bert_tp.formats.convert import to_huggingface
from megatron_bert_tp.formats.weights import ModelSource
from tests.faults.runs import tensors_of
from tests.finetuning.runs import (
    EVALUATE,
    FINETUNE,
    exported,
    measure,
    predictions_of,
    read_json,
    result_of,
    run_rank,
    tune,
)
from tests.training.runs import records

FEW = "optimizer.steps=2", "run.evaluate_every=2", "optimizer.precision=float32"
# So small that no answer changes, and so the first evaluation stays the best.
STANDSTILL = "optimizer.learning_rate=1e-7", "run.evaluate_every=2", "run.save_every=2", "run.metric=accuracy"
ROWS = "id,text,label\n0,a film,x\n1,the time,y\n2,no film,x\n"


def told_by(ranks, settings, folder, *overrides):
    """What a fine-tuning on one rank says."""
    (told,) = ranks.run(1, run_rank, "finetune", settings, (f"run.directory={folder}", *overrides))
    return told


@pytest.fixture
def own(small_model, tmp_path):
    """Settings of a classification from tables that a test may write anew."""
    paths = {part: tmp_path / f"{part}.csv" for part in ("train", "validation", "test")}
    for path in paths.values():
        path.write_text(ROWS)
    settings = tmp_path / "task.yaml"
    settings.write_text(
        f"""
model: {{weights: "{small_model}"}}
task: {{name: classification, columns: {{id: id}}}}
data: {{train: "{paths["train"]}", validation: "{paths["validation"]}", test: "{paths["test"]}",
        sequence_length: 16}}
optimizer: {{global_batch: 2, steps: 2}}
parallel: {{microbatch: 2}}
run: {{directory: "{tmp_path}/unused", device: cpu}}
"""
    )
    return settings, paths


def test_other_ids_of_the_test_part_are_written(ranks, own, tmp_path):
    settings, paths = own
    folder = tmp_path / "run"
    told_by(ranks, settings, folder)
    assert "is already finished" in told_by(ranks, settings, folder)
    paths["test"].write_text(ROWS.replace("\n0,", "\nzero,"))
    assert "is already finished" not in told_by(ranks, settings, folder)
    assert [record["id"] for record in predictions_of(folder, "test")] == ["zero", "1", "2"]


def test_labels_with_other_names_are_other_samples(own, message_of, tmp_path):
    settings, paths = own
    given = f"run.directory={tmp_path}/run"
    assert message_of(FINETUNE, settings, given)[0] == ExitCode.FINISHED
    before = predictions_of(tmp_path / "run")
    for path in paths.values():
        path.write_text(ROWS.replace(",x", ",no").replace(",y", ",yes"))
    code, told = message_of(FINETUNE, settings, given)
    assert code == ExitCode.BAD_SETTINGS
    assert f"data.train: ['{paths['train']}'] gives other samples now" in told
    assert predictions_of(tmp_path / "run") == before


def test_answers_that_are_added_are_measured_by(ranks, files_of, tmp_path):
    files = files_of(Kind.ANSWER)
    validation = tmp_path / "validation.json"
    content = json.loads(files.validation.read_text(encoding="utf-8"))
    validation.write_text(json.dumps(content), encoding="utf-8")
    given = (*FEW, f"data.validation={validation}")
    folder = tmp_path / "run"
    told_by(ranks, files.settings, folder, *given)
    assert result_of(folder)["metrics"]["validation"]["exact_match"] < 1
    said = {record["id"]: record["answer"] for record in predictions_of(folder)}
    for paragraph in (each for article in content["data"] for each in article["paragraphs"]):
        for question in paragraph["qas"]:
            text = said[question["id"]]
            question["answers"].append({"text": text, "answer_start": paragraph["context"].index(text)})
    validation.write_text(json.dumps(content), encoding="utf-8")
    told_by(ranks, files.settings, folder, *given)
    assert result_of(folder)["metrics"]["validation"]["exact_match"] == 1


def test_an_evaluation_never_draws_weights(ranks, files_of, tmp_path):
    """The settings of a training from random weights measure what it has learned."""
    settings = files_of(Kind.NUMBER).settings
    folder = tune(ranks, settings, tmp_path / "run", *FEW, "model.random_weights=true")
    given = (*FEW, "data.train=null")
    plain = measure(ranks, settings, folder, tmp_path / "plain", *given)
    found = measure(ranks, settings, folder, tmp_path / "random", *given, "model.random_weights=true")
    assert found == plain
    assert found["validation"]["pearson"] == pytest.approx(
        result_of(folder)["metrics"]["validation"]["pearson"], abs=1e-5
    )


@pytest.fixture(scope="module")
def passed(ranks, files_of, tmp_path_factory):
    """A finished run whose first evaluation stayed the best, and what it said."""
    folder = tmp_path_factory.mktemp("passed") / "run"
    given = (*STANDSTILL, "optimizer.steps=12", "run.patience=2")
    return folder, told_by(ranks, files_of(Kind.CLASS).settings, folder, *given), given


def test_the_folder_of_a_run_is_its_best_model(passed, tmp_path):
    folder, _, _ = passed
    assert result_of(folder)["best_step"] == 2
    best = exported(folder)
    source = ModelSource.open(folder)
    name = "bert.encoder.layer.1.output.dense.weight"
    found = source.read(name, (0, 0), tuple(best[name].shape))
    assert torch.equal(found, best[name])
    assert not torch.equal(found, tensors_of(folder, 6)[f"weight/{name}"])
    told = to_huggingface(folder, tmp_path / "newest")
    assert "step 6" in told
    assert f"the best one of this run is in {folder / 'model'} already" in told


def test_the_end_of_patience_is_told(passed):
    _, told, _ = passed
    assert "ends after step 6 of 12: run.patience = 2, and nothing since step 2 was better" in told


def test_evaluations_that_do_not_count_are_told(ranks, files_of, passed, tmp_path):
    folder, _, given = passed
    files = files_of(Kind.CLASS)
    again = shutil.copytree(folder, tmp_path / "run")
    few = tmp_path / "few.tsv"
    few.write_text("".join(files.validation.read_text(encoding="utf-8").splitlines(keepends=True)[:6]))
    told = told_by(ranks, files.settings, again, *given, f"data.validation={few}")
    assert "3 of 3 evaluations on record left out" in told
    assert "and from step 6 on" in told
    assert "validation at step 6" in told, "the weights that it begins with are measured on the new samples"
    assert result_of(again)["best_step"] == 6


def test_evaluations_on_the_same_samples_count(ranks, own, tmp_path):
    """Where only ids have changed, the best model stays."""
    settings, paths = own
    folder, given = tmp_path / "run", (*STANDSTILL, "optimizer.steps=6")
    told_by(ranks, settings, folder, *given)
    before, steps = exported(folder), [record["step"] for record in records(folder, "evaluation")]
    assert (result_of(folder)["best_step"], steps) == (2, [2, 4, 6])
    paths["validation"].write_text(ROWS.replace("\n0,", "\nzero,"))
    told = told_by(ranks, settings, folder, *given)
    assert "on record left out" not in told
    assert "is already finished" not in told
    assert result_of(folder)["best_step"] == 2
    assert [record["step"] for record in records(folder, "evaluation")] == steps
    assert [name for name, tensor in exported(folder).items() if not torch.equal(tensor, before[name])] == []
    assert predictions_of(folder)[0]["id"] == "zero"


def test_what_is_no_longer_asked_for_is_removed(ranks, own, tmp_path):
    settings, _ = own
    folder = tmp_path / "run"
    told_by(ranks, settings, folder)
    assert predictions_of(folder, "test")
    told = told_by(ranks, settings, folder, "data.test=null")
    assert f"{folder / 'predictions.test.jsonl'}: removed" in told
    assert not (folder / "predictions.test.jsonl").exists()
    assert len(predictions_of(folder)) == 3
    measure(ranks, settings, folder, tmp_path / "measured")
    measure(ranks, settings, folder, tmp_path / "measured", "data.validation=null")
    assert not (tmp_path / "measured" / "predictions.validation.jsonl").exists()
    assert len(predictions_of(tmp_path / "measured", "test")) == 3


def test_submissions_of_another_task_are_removed(ranks, files_of, tmp_path):
    files = files_of(Kind.CLASS)
    given = (*FEW, f"data.test={files.validation}")
    folder = tune(ranks, files.settings, tmp_path / "run", *given)
    assert (folder / "submission" / "test").exists()
    (folder / "submission" / "validation" / "older.tsv").write_text("")
    tune(ranks, files.settings, folder, *FEW)
    assert not (folder / "submission" / "test").exists()
    assert [path.name for path in (folder / "submission" / "validation").iterdir()] == ["MRPC.tsv"]


@pytest.mark.parametrize("learns", [True, False], ids=["random", "weights"])
def test_sizes_and_a_tokenizer_are_enough_for_random_weights(
    ranks, files_of, small_model, message_of, tmp_path, learns
):
    sizes = tmp_path / "sizes"
    sizes.mkdir()
    for name in ("config.json", "vocab.txt"):
        shutil.copy(small_model / name, sizes)
    settings = files_of(Kind.CLASS).settings
    given = (*FEW, f"model.weights={sizes}", f"run.directory={tmp_path}/run")
    if not learns:
        code, told = message_of(FINETUNE, settings, *given)
        assert code == ExitCode.BAD_CHECKPOINT
        assert "has neither model.safetensors" in told
        return
    found = exported(tune(ranks, settings, tmp_path / "run", *given[:-1], "model.random_weights=true"))
    whole = (*FEW, f"model.weights={small_model}", "model.random_weights=true")
    expected = exported(tune(ranks, settings, tmp_path / "whole", *whole))
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_the_tokenizer_of_a_checkpoint_is_verified_for_random_weights_too(ranks, files_of, message_of, tmp_path):
    settings = files_of(Kind.CLASS).settings
    folder = tune(ranks, settings, tmp_path / "run", *FEW)
    checkpoint = shutil.copytree(folder / "checkpoints" / "step_00000002", tmp_path / "checkpoint")
    given = (*FEW, f"model.weights={checkpoint}", "model.random_weights=true", f"run.directory={tmp_path}/random")
    vocabulary = checkpoint / "vocab.txt"
    whole = vocabulary.read_bytes()
    vocabulary.write_bytes(whole[:-2] + b"~" + whole[-1:])
    code, told = message_of(FINETUNE, settings, *given)
    assert (code, "vocab.txt" in told) == (ExitCode.BAD_CHECKPOINT, True)
    vocabulary.write_bytes(whole)
    assert message_of(FINETUNE, settings, *given)[0] == ExitCode.FINISHED


def test_other_sizes_are_another_beginning_of_random_weights(files_of, small_model, message_of, tmp_path):
    """Other weights are not: only the sizes are taken."""
    sizes = tmp_path / "sizes"
    sizes.mkdir()
    for name in ("config.json", "vocab.txt"):
        shutil.copy(small_model / name, sizes)
    settings = files_of(Kind.CLASS).settings
    given = (*FEW, f"run.directory={tmp_path}/run", f"model.weights={sizes}", "model.random_weights=true")
    assert message_of(FINETUNE, settings, *given)[0] == ExitCode.FINISHED
    shutil.copy(small_model / "model.safetensors", sizes)
    before = result_of(tmp_path / "run")
    assert message_of(FINETUNE, settings, *given)[0] == ExitCode.FINISHED
    assert result_of(tmp_path / "run") == before
    config = json.loads((sizes / "config.json").read_text())
    (sizes / "config.json").write_text(json.dumps({**config, "initializer_range": 0.01}))
    code, told = message_of(FINETUNE, settings, *given)
    assert code == ExitCode.BAD_SETTINGS
    assert f"model.weights: {sizes} holds another model than that of the beginning" in told


# Seeds


def test_seeds_and_a_single_training_have_folders_of_their_own(files_of, message_of, tmp_path):
    settings = files_of(Kind.NUMBER).settings
    single, several = (f"run.directory={tmp_path}/{name}" for name in ("single", "several"))
    assert message_of(FINETUNE, settings, *FEW, single)[0] == ExitCode.FINISHED
    assert message_of(FINETUNE, settings, *FEW, several, "run.seeds=[1]")[0] == ExitCode.FINISHED
    code, told = message_of(FINETUNE, settings, *FEW, single, "run.seeds=[1]")
    assert (code, "holds a training without run.seeds" in told) == (ExitCode.BAD_SETTINGS, True)
    code, told = message_of(FINETUNE, settings, *FEW, several)
    assert (code, "holds trainings of run.seeds" in told) == (ExitCode.BAD_SETTINGS, True)
    measured = f"run.directory={tmp_path}/measured"
    code, told = message_of(EVALUATE, settings, f"model.weights={tmp_path}/several", measured)
    assert code == ExitCode.BAD_CHECKPOINT
    assert f"give one of them, as {tmp_path}/several/seed_1" in told
    for folder in (single, several):
        code, told = message_of(EVALUATE, settings, f"model.weights={tmp_path}/single", folder)
        assert (code, "holds a training" in told) == (ExitCode.BAD_SETTINGS, True)
    assert message_of(EVALUATE, settings, f"model.weights={tmp_path}/single", measured)[0] == ExitCode.FINISHED
    code, told = message_of(FINETUNE, settings, *FEW, measured)
    assert (code, "holds what `evaluate` has measured" in told) == (ExitCode.BAD_SETTINGS, True)


def test_a_folder_of_the_users_own_is_no_seed(files_of, message_of, tmp_path):
    (tmp_path / "run" / "seed_data").mkdir(parents=True)
    given = (*FEW, f"run.directory={tmp_path}/run")
    assert message_of(FINETUNE, files_of(Kind.NUMBER).settings, *given)[0] == ExitCode.FINISHED


@pytest.mark.parametrize("validates", [True, False], ids=["validation", "test alone"])
def test_the_summary_has_every_part(ranks, files_of, tmp_path, validates):
    files = files_of(Kind.NUMBER)
    none = () if validates else ("data.validation=null", "run.evaluate_every=null")
    few = [value for value in FEW if validates or "evaluate_every" not in value]
    given = (*few, f"data.test={files.validation}", "run.seeds=[1, 2]", *none)
    told = told_by(ranks, files.settings, tmp_path / "run", *given)
    summary = read_json(tmp_path / "run" / "summary.json")
    parts = ["validation", "test"] if validates else ["test"]
    assert list(summary) == ["seeds", *parts]
    for part in parts:
        values = [summary["seeds"][seed]["metrics"][part]["pearson"] for seed in ("1", "2")]
        row = summary[part]["pearson"]
        assert (row["least"], row["most"]) == (min(values), max(values))
        assert f"{part} pearson: median {row['median']:.4f} of 2 seeds" in told
    assert "\n\n" not in told
    assert [line for line in told.splitlines() if line.startswith("seed ")] == [
        f"seed {seed}: {tmp_path}/run/seed_{seed}" for seed in (1, 2)
    ]
    assert len(records(tmp_path / "run" / "seed_1", "step")) == 2
