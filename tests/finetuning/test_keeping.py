"""What a folder of a run holds is of one experiment: its weights, its data, its best checkpoint."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bert_tp.config.task_table import Kind
from megatron_bert_tp.errors import DataError, ExitCode
from megatron_bert_tp.training.task_evaluation import Standing
from megatron_bert_tp.training.task_results import read_result
from tests.finetuning.cases import Files
from tests.finetuning.runs import EVALUATE, FINETUNE, evaluations_of, exported, predictions_of, result_of, tune

SHORT = "optimizer.steps=6", "run.evaluate_every=2", "optimizer.learning_rate=1e-3"


@pytest.fixture
def other_weights(small_model, tmp_path) -> Path:
    """The model with one number changed, in the middle of a file."""
    folder = Path(shutil.copytree(small_model, tmp_path / "other"))
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.encoder.ln.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_other_first_weights_are_another_experiment(files_of, other_weights, message_of, tmp_path):
    settings, folder = files_of(Kind.NUMBER).settings, tmp_path / "run"
    assert message_of(FINETUNE, settings, f"run.directory={folder}", *SHORT)[0] == ExitCode.FINISHED
    before = result_of(folder)
    others = f"run.directory={folder}", f"model.weights={other_weights}"
    code, told = message_of(FINETUNE, settings, *others, *SHORT)
    assert code == ExitCode.BAD_SETTINGS
    assert f"model.weights: {other_weights} holds another model than that of the beginning" in told
    assert result_of(folder) == before


def test_frozen_weights_keep_all_their_digits_in_narrow_formats(ranks, files_of, small_model, tmp_path):
    given = "model.frozen_layers=1", "optimizer.precision=bfloat16"
    found = exported(tune(ranks, files_of(Kind.CLASS).settings, tmp_path / "run", *SHORT, *given))
    first = load_file(small_model / "model.safetensors")
    frozen = [name for name in found if name.startswith(("bert.embeddings.", "bert.encoder.layer.0."))]
    assert frozen
    assert not torch.equal(first[frozen[0]], first[frozen[0]].bfloat16().float()), "rounding would show"
    assert [name for name in frozen if not torch.equal(found[name], first[name])] == []


def test_evaluations_on_other_data_do_not_count(ranks, files_of, tmp_path):
    """The best is looked for among the evaluations on the new data, which begin where the run stands."""
    files: Files = files_of(Kind.NUMBER)
    settings, folder = files.settings, tmp_path / "run"
    few = tmp_path / "few.tsv"
    few.write_text("".join(files.validation.read_text(encoding="utf-8").splitlines(keepends=True)[:6]))
    endless = "optimizer.schedule=constant", "run.evaluate_every=2", "optimizer.learning_rate=1e-3"
    tune(ranks, settings, folder, *endless, "optimizer.steps=4", f"data.validation={few}")
    tune(ranks, settings, folder, *endless, "optimizer.steps=8", "run.allow_changes=true")
    evaluations = evaluations_of(folder)
    own = [row for row in evaluations if row["measured_on"] == evaluations[-1]["measured_on"]]
    assert [row["step"] for row in evaluations] == [2, 4, 4, 6, 8]
    assert [row["step"] for row in own] == [4, 6, 8], "where it stands is measured anew"
    best = max(own, key=lambda row: row["pearson"])
    assert result_of(folder)["best_step"] == best["step"]


def test_a_best_checkpoint_that_is_gone_is_not_the_best(ranks, files_of, tmp_path):
    """Steps that move nothing: the first evaluation is as good as all others, and so is the best."""
    settings, folder = files_of(Kind.NUMBER).settings, tmp_path / "run"
    given = *SHORT[:2], "optimizer.name=sgd", "optimizer.learning_rate=1e-60", "optimizer.weight_decay=0"
    assert result_of(tune(ranks, settings, folder, *given))["best_step"] == 2
    shutil.rmtree(folder / "checkpoints" / "step_00000002")
    (folder / "result.json").unlink()
    assert result_of(tune(ranks, settings, folder, *given))["best_step"] == 6


@pytest.mark.parametrize("content", ["{}", '{"seed": 1, "best_step": 2, "metric": "f1", "metrics": 3}', "[]", "x"])
def test_a_result_that_is_none_is_told(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(DataError, match=r"result\.json"):
        read_result(tmp_path)


def test_a_best_evaluation_that_could_not_be_saved_counts_as_worse():
    first = Standing().after(2, 0.5, sign=1.0)
    assert (first.step, first.value, first.worse_since) == (2, 0.5, 0)
    better = first.after(4, 0.7, sign=1.0)
    assert (better.step, better.worse_since) == (4, 0)
    assert first.passed_over() == Standing(2, 0.5, 1)
    assert first.after(4, 0.5, sign=1.0) == Standing(2, 0.5, 1), "as good is not better"
    assert first.after(4, 0.3, sign=-1.0) == Standing(4, 0.3, 0), "smaller is better"


def test_evaluate_leaves_the_folder_of_a_training_alone(ranks, files_of, message_of, tmp_path):
    settings, folder = files_of(Kind.NUMBER).settings, tmp_path / "run"
    tune(ranks, settings, folder, *SHORT)
    before = predictions_of(folder), result_of(folder), (folder / "exit.json").read_bytes()
    code, told = message_of(EVALUATE, settings, f"model.weights={folder}/model", f"run.directory={folder}")
    assert code == ExitCode.BAD_SETTINGS
    assert "holds a training" in told
    assert (predictions_of(folder), result_of(folder), (folder / "exit.json").read_bytes()) == before


def test_a_model_of_another_task_is_not_measured_with_a_head_made_up(ranks, files_of, message_of, tmp_path):
    model = tune(ranks, files_of(Kind.CLASS).settings, tmp_path / "run", *SHORT) / "model"
    given = f"model.weights={model}", f"run.directory={tmp_path}/evaluation"
    code, told = message_of(EVALUATE, files_of(Kind.NUMBER).settings, *given)
    assert code == ExitCode.BAD_SETTINGS
    assert "has learned a single_label_classification, but task.name = 'sts-b' is a regression" in told


def test_weights_of_classes_must_be_as_many_as_the_classes_of_the_data(files_of, message_of, tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "".join(f"w{row},{'abc'[row % 3]}\n" for row in range(9)))
    settings = tmp_path / "task.yaml"
    settings.write_text(
        f"""
model: {{weights: "{files_of(Kind.CLASS).weights}"}}
task: {{name: classification, class_weights: [1.0, 9.0]}}
data: {{train: "{path}", sequence_length: 16}}
optimizer: {{global_batch: 3, steps: 1}}
parallel: {{microbatch: 3}}
run: {{directory: "{tmp_path}/run", device: cpu}}
"""
    )
    code, told = message_of(FINETUNE, settings)
    assert code == ExitCode.BAD_SETTINGS
    assert "task.class_weights has 2 weights, but there are 3 classes: a, b, c" in told
