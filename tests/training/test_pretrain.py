"""The command that users start, and what it writes."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.config.load import load_config
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.config.settings import all_sections, all_settings
from megatron_bert_tp.errors import ExitCode
from tests.training.runs import ROOT, pretrain, records, start, succeeded, without_times


def test_every_step_is_one_record_with_all_that_is_promised(finished_run):
    rows = records(finished_run, "step")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["samples"] for row in rows] == list(range(8, 161, 8))
    wanted = {"step", "samples", "loss", "mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy", "grad_norm"}
    wanted |= {"learning_rate", "tokens_per_second", "tokens", "seconds", "seconds_left", "kind"}
    wanted |= {"data_seconds", "padding", "weight_decay", "loss_scale", "skipped"}
    assert all(set(row) == wanted for row in rows)
    assert all(row["loss"] == row["mlm_loss"] + row["nsp_loss"] for row in rows)
    assert all(0 < row["data_seconds"] < row["seconds"] for row in rows)
    # Of eight samples two to a microbatch, some rows are padded, and to less than twice the tokens.
    assert all(0 <= row["padding"] < 0.5 for row in rows)
    assert max(row["padding"] for row in rows) > 0


def test_an_evaluation_at_the_end_reports_the_unigram_bar(finished_run):
    first, last = records(finished_run, "evaluation")
    assert (first["step"], last["step"]) == (10, 20)
    assert "unigram_loss" not in first
    # Add-one frequencies of about 94 words that are nearly equally frequent.
    assert last["unigram_loss"] == pytest.approx(4.54, abs=0.15)
    assert last["masked"] == first["masked"] > 0


def test_the_settings_of_a_run_are_kept_and_read_back_equal(finished_run, data):
    overrides = [f"run.directory={finished_run}", "parallel.tensor=2", "parallel.pipeline=2"]
    assert load_config(finished_run / "config.yaml") == load_config(data, overrides)


@pytest.mark.parametrize("processes", [0, 2])
def test_data_parallel_and_one_process_follow_the_tensor_x_pipeline_curve(data, finished_run, tmp_path, processes):
    succeeded(pretrain(data, f"run.directory={tmp_path}/run", "optimizer.steps=20", processes=processes))
    for here, there in zip(records(tmp_path / "run", "step"), records(finished_run, "step"), strict=True):
        # As in the resume test: rounding of float32 sums, grown by twenty AdamW steps of 1e-2.
        assert here["loss"] == pytest.approx(there["loss"], abs=2e-3)
        assert here["tokens"] == there["tokens"]
    here, there = (records(folder, "evaluation")[-1] for folder in (tmp_path / "run", finished_run))
    assert here["masked"] == there["masked"]
    assert here["unigram_loss"] == pytest.approx(there["unigram_loss"], rel=1e-12)


@pytest.mark.slow  # a run that is stopped and goes on gives the same bits, which the quick set sees
def test_the_same_run_twice_is_the_same_bit_for_bit(data, finished_run, tmp_path):
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "run.evaluation_samples=0"]
    succeeded(pretrain(data, f"run.directory={tmp_path}/run", *layout, processes=4))
    assert without_times(records(tmp_path / "run", "step")) == without_times(records(finished_run, "step"))


def test_weights_of_another_vocabulary_are_refused(data, finished_run, tmp_path):
    """Of the same size and kind, so that nothing else would tell."""
    succeeded(start("megatron_bert_tp.convert", "to-hf", finished_run, tmp_path / "exported"))
    (tmp_path / "exported" / "tokenizer.json").unlink()
    entries = (tmp_path / "exported" / "vocab.txt").read_text().replace("w7\n", "other\n")
    (tmp_path / "exported" / "vocab.txt").write_text(entries)
    done = pretrain(data, f"run.directory={tmp_path}/run", f"model.weights={tmp_path}/exported")
    assert done.returncode == ExitCode.BAD_DATA
    assert "entries that are not the 99 of" in done.stderr
    assert f"set data.tokenizer={tmp_path}/exported/vocab.txt" in done.stderr


def test_a_run_starts_from_the_weights_of_a_hugging_face_directory(data, finished_run, tmp_path):
    succeeded(start("megatron_bert_tp.convert", "to-hf", finished_run, tmp_path / "exported"))
    paths = [f"run.directory={tmp_path}/run", f"model.weights={tmp_path}/exported"]
    standing = ["optimizer.steps=1", "optimizer.warmup_steps=0", "optimizer.learning_rate=1e-12"]
    succeeded(pretrain(data, *paths, *standing, "parallel.tensor=2", processes=2))
    first, last = (record["mlm_loss"] for record in records(finished_run, "evaluation"))
    (found,) = (record["mlm_loss"] for record in records(tmp_path / "run", "evaluation"))
    # Evaluation has no dropout: the same weights, and float32 sums of some hundred terms in another order.
    assert found == pytest.approx(last, abs=1e-5)
    assert abs(first - last) > 1e-3, "guards the line above: other weights give another loss"


def test_help_tells_every_section_and_every_setting_with_its_meaning():
    blocks = succeeded(start("megatron_bert_tp.pretrain", "--help")).split("\n\n")
    for section in all_sections(Config):
        (block,) = (block for block in blocks if block.startswith(f"{section}: "))
        lines = block.splitlines()
        for path, setting in all_settings(Config).items():
            if path.rpartition(".")[0] == section:
                name = path.rpartition(".")[2]
                (start_of_row,) = (n for n, line in enumerate(lines) if line.startswith(f"  {name} "))
                row = " ".join(" ".join(lines[start_of_row : start_of_row + 4]).split())
                assert setting.meaning.split()[-1] in row
                assert not setting.is_required or " required " in row


@pytest.mark.slow
def test_the_345m_settings_train_a_smaller_model_on_eight_processes(data, tmp_path):
    """All of `configs/345m.yaml` but for the sizes; nothing is evaluated, to keep it short."""
    settings = {
        "model.hidden_size": 64, "model.num_hidden_layers": 4, "model.intermediate_size": 128,
        "data.corpus": data.parent / "corpus", "data.tokenizer": data.parent / "vocab.txt",
        "optimizer.global_batch": 16, "optimizer.steps": 3, "optimizer.warmup_steps": 1,
        "run.directory": tmp_path / "run", "run.evaluation_samples": 0, "run.device": "cpu",
    }  # fmt: skip
    overrides = [f"{path}={value}" for path, value in settings.items()]
    output = succeeded(pretrain(ROOT / "configs" / "345m.yaml", *overrides, processes=8))
    assert "8 processes: data 2 x pipeline 2 x tensor 2" in output
    rows = records(tmp_path / "run", "step")
    assert [row["samples"] for row in rows] == [16, 32, 48]
    # Untrained, all 30522 words are about equally likely: ln(30522) = 10.33 nats.
    assert rows[0]["mlm_loss"] == pytest.approx(10.33, abs=0.2)


def default_interrupt() -> None:
    """Shells start background jobs with SIGINT ignored, and children inherit it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupt_saves_says_so_and_goes_on(data, tmp_path):
    folder = tmp_path / "run"
    settings = ("optimizer.steps=100000", "run.evaluation_samples=0", "run.save_every=1000000")
    given = (str(data), f"run.directory={folder}", *settings)
    command = [sys.executable, "-m", "megatron_bert_tp.pretrain", *given]
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 60
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=default_interrupt
    ) as process:
        try:
            while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 7):
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            output = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == ExitCode.STOPPED
    last = int(records(folder, "step")[-1]["step"])
    assert last >= 7
    saved = f"{folder}/checkpoints/step_{last:08d}"
    assert f"stopped after step {last} of 100000 (SIGINT); all is saved in {saved}, and the same" in output
    assert Checkpoint.open(folder).step == last
    outcome = json.loads((folder / "exit.json").read_text())
    assert (outcome["code"], outcome["step"], outcome["checkpoint"]) == (75, last, saved)


@pytest.mark.parametrize("task", ["sop", "none"])
def test_the_console_names_the_pair_task_and_what_was_read(data, tmp_path, task):
    settings = (f"objective.pairs={task}", "optimizer.steps=3", "optimizer.warmup_steps=1")
    output = succeeded(pretrain(data, f"run.directory={tmp_path}/run", *settings))
    assert "nsp" not in output
    assert ("  sop 0." in output) == (task == "sop")
    corpus = re.escape(str(data.parent / "corpus"))
    assert re.search(rf"samples an epoch from {corpus}; 24 in the whole run, [\d.]+ epochs", output)
    assert re.search(rf"^read: 24 samples \([\d.]+ epochs\) of {corpus}$", output, re.MULTILINE)
    again = succeeded(pretrain(data, f"run.directory={tmp_path}/run", *settings))
    assert "already finished" in again
    assert "read:" not in again
