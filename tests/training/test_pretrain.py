"""The command that users start: what it writes, and that it learns."""

import pytest

from megatron_bert_tp.config.load import load_config
from tests.training.runs import pretrain, records, start, succeeded, without_times


def test_every_step_is_one_record_with_all_that_is_promised(finished_run):
    rows = records(finished_run, "step")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["samples"] for row in rows] == list(range(8, 161, 8))
    wanted = {"step", "samples", "loss", "mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy", "grad_norm"}
    wanted |= {"learning_rate", "tokens_per_second", "tokens", "seconds", "seconds_left", "kind"}
    assert all(set(row) == wanted for row in rows)
    assert all(row["loss"] == row["mlm_loss"] + row["nsp_loss"] for row in rows)


def test_a_small_model_learns_words_that_follow_a_rule(finished_run):
    rows = records(finished_run, "step")
    # 94 words of equal frequency: ln(94) = 4.54 nats is the best without learning from the context.
    assert rows[0]["mlm_loss"] > 4.4
    assert rows[-1]["mlm_loss"] < rows[0]["mlm_loss"]


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


def test_the_same_run_twice_is_the_same_bit_for_bit(data, finished_run, tmp_path):
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "run.evaluation_samples=0"]
    succeeded(pretrain(data, f"run.directory={tmp_path}/run", *layout, processes=4))
    assert without_times(records(tmp_path / "run", "step")) == without_times(records(finished_run, "step"))


def test_help_names_every_section():
    output = succeeded(start("megatron_bert_tp.pretrain", "--help"))
    for path in ("model.hidden_size", "objective.masking.probability", "parallel.tensor", "run.directory"):
        assert path.rpartition(".")[2] in output
