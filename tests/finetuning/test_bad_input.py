"""Files and settings that do not fit end the command with one message that says where and what to do."""

import json
import re
import shutil

import pytest

from megatron_bert_tp.config.task_table import Kind
from megatron_bert_tp.errors import ExitCode
from tests.finetuning.cases import first_lines
from tests.finetuning.runs import EVALUATE, FINETUNE
from tests.training.runs import start


def changed(source, target, before, after, *, count=1):
    """Copy of a file in which a text stands in place of another; gives it and the line of the first place."""
    text = source.read_text(encoding="utf-8")
    assert before in text
    target.write_text(text.replace(before, after, count), encoding="utf-8")
    return target, text[: text.index(before)].count("\n") + 1


@pytest.mark.parametrize("setting", ["data.train", "data.validation", "data.test"])
def test_a_file_that_is_not_there(message_of, files_of, tmp_path, setting):
    given = f"{setting}={tmp_path}/absent.tsv", f"run.directory={tmp_path}/run"
    code, told = message_of(FINETUNE, files_of(Kind.CLASS).settings, *given)
    assert code == ExitCode.BAD_DATA
    assert f"{tmp_path}/absent.tsv" in told


def test_a_label_outside_of_the_set(message_of, files_of, tmp_path):
    files = files_of(Kind.CLASS)
    path = tmp_path / "dev.tsv"
    rows = files.validation.read_text(encoding="utf-8").splitlines(keepends=True)
    rows[4] = f"maybe{rows[4][1:]}"
    path.write_text("".join(rows), encoding="utf-8")
    code, told = message_of(
        FINETUNE, files.settings, f"data.validation={path}", f"run.directory={tmp_path}/run"
    )
    assert code == ExitCode.BAD_DATA
    assert f"{path}:5" in told
    assert "'maybe'" in told


def test_a_tag_that_training_does_not_know(message_of, files_of, tmp_path):
    files = files_of(Kind.TAGS)
    path, line = changed(files.validation, tmp_path / "dev.conll", "\tB-person", "\tB-hero")
    code, told = message_of(
        FINETUNE, files.settings, f"data.validation={path}", f"run.directory={tmp_path}/run"
    )
    assert code == ExitCode.BAD_DATA
    assert "'B-hero'" in told
    assert f"{path}:{line}: " in told


def test_a_missing_column(message_of, files_of, tmp_path):
    files = files_of(Kind.CLASSES)
    path, _ = changed(files.train, tmp_path / "train.csv", "text,label", "text,topic")
    code, told = message_of(FINETUNE, files.settings, f"data.train={path}", f"run.directory={tmp_path}/run")
    assert code == ExitCode.BAD_DATA
    assert f"{path}:1: the column 'label' is missing; there are 'text', 'topic'" in told
    assert "task.columns" in told


def test_an_empty_validation_file(message_of, files_of, tmp_path):
    files = files_of(Kind.CLASS)
    path = tmp_path / "dev.tsv"
    path.write_text(files.validation.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    code, told = message_of(
        FINETUNE, files.settings, f"data.validation={path}", f"run.directory={tmp_path}/run"
    )
    assert code == ExitCode.BAD_DATA
    assert f"{path}: has no example" in told


def test_a_model_of_another_class_is_not_evaluated(message_of, files_of, small_model, tmp_path):
    code, told = message_of(
        EVALUATE, files_of(Kind.CLASS).settings, f"model.weights={small_model}", f"run.directory={tmp_path}/run"
    )
    assert code == ExitCode.BAD_SETTINGS
    assert f"{small_model}: is a MegatronBertForPreTraining" in told
    assert "MegatronBertForSequenceClassification" in told


def test_four_options_beside_three(message_of, files_of, tmp_path):
    files = files_of(Kind.CHOICE)
    folder = tmp_path / "dev"
    shutil.copytree(files.validation, folder)
    path = folder / "middle" / "3.txt"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["options"][0].append("one more")
    path.chmod(0o600)
    path.write_text(json.dumps(content), encoding="utf-8")
    code, told = message_of(
        FINETUNE, files.settings, f"data.validation={folder}", f"run.directory={tmp_path}/run"
    )
    assert code == ExitCode.BAD_DATA
    assert str(path) in told
    assert re.search(r"\b4 choices\b.*\b3\b", told.replace(str(path), "")), told


def test_samples_longer_than_the_positions_of_the_weights(message_of, files_of, small_model, tmp_path):
    code, told = message_of(
        FINETUNE, files_of(Kind.CLASS).settings, "data.sequence_length=129", f"run.directory={tmp_path}/run"
    )
    assert code == ExitCode.BAD_SETTINGS
    assert "data.sequence_length = 129" in told
    assert "128" in told
    assert str(small_model) in told


def test_a_metric_that_this_task_does_not_measure(message_of, files_of, tmp_path):
    code, told = message_of(
        FINETUNE, files_of(Kind.CLASS).settings, "run.metric=pearson", f"run.directory={tmp_path}/run"
    )
    assert code == ExitCode.BAD_SETTINGS
    assert "run.metric" in told
    assert "f1" in told


def test_a_metric_that_this_data_does_not_have(message_of, files_of, tmp_path):
    """Settings alone cannot tell that the articles are all of the middle level."""
    code, told = message_of(
        FINETUNE, files_of(Kind.CHOICE).settings, "run.metric=accuracy_high", "optimizer.steps=1",
        "run.evaluate_every=1", f"run.directory={tmp_path}/run",
    )  # fmt: skip
    assert code == ExitCode.BAD_SETTINGS
    assert "run.metric is 'accuracy_high'" in told


def test_a_part_that_is_not_there_is_told_before_the_first_step(message_of, files_of, tmp_path):
    files = files_of(Kind.CLASS)
    other = first_lines(files.validation, tmp_path / "other.tsv", 5)
    both = f"data.validation={json.dumps([str(files.validation), str(other)])}"
    given = files.settings, both, f"run.directory={tmp_path}/run", "optimizer.steps=1"
    code, told = message_of(FINETUNE, *given, "run.metric=f1_othr")
    assert code == ExitCode.BAD_SETTINGS
    assert "run.metric is 'f1_othr', but measured are f1, accuracy, f1_dev, accuracy_dev, f1_other" in told
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert message_of(FINETUNE, *given, "run.metric=f1_other")[0] == 0


def test_a_loss_that_is_not_finite_names_the_warm_up_of_a_task(message_of, files_of, tmp_path):
    given = "optimizer.learning_rate=1e200", "optimizer.warmup_share=0", f"run.directory={tmp_path}/run"
    code, told = message_of(FINETUNE, files_of(Kind.CLASS).settings, *given)
    assert code == ExitCode.NOT_FINITE
    assert "lengthen the warm-up (optimizer.warmup_share), or look at these samples" in told


@pytest.mark.parametrize(("allowed", "code"), [(0.01, ExitCode.BAD_DATA), (0.5, ExitCode.FINISHED)])
def test_answers_that_do_not_stand_at_their_place(message_of, files_of, tmp_path, allowed, code):
    files = files_of(Kind.ANSWER)
    content = json.loads(files.train.read_text(encoding="utf-8"))
    content["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] += 1
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    given = "optimizer.steps=1", "data.validation=null", "run.evaluate_every=null", f"task.bad_answers={allowed}"
    found, told = message_of(
        FINETUNE, files.settings, f"data.train={path}", *given, f"run.directory={tmp_path}/run"
    )
    assert found == code
    if code == ExitCode.BAD_DATA:
        assert str(path) in told
        assert "task.bad_answers" in told


def test_under_torchrun_the_message_comes_once(files_of, tmp_path):
    files = files_of(Kind.CLASS)
    path = tmp_path / "dev.tsv"
    path.write_text(files.validation.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    done = start(FINETUNE, files.settings, f"data.validation={path}", f"run.directory={tmp_path}/run", processes=2)
    assert done.returncode == 1, "torchrun's own"
    told = [line for line in done.stderr.splitlines() if line.startswith("error on rank")]
    assert len(told) == 1
    assert f"{path}: has no example" in told[0]
