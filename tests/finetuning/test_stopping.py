"""What a stop leaves behind, who else may write into a folder, and processes that make batches."""

import os
import signal

from megatron_bert_tp.config.task_table import Kind
from megatron_bert_tp.errors import ExitCode
from megatron_bert_tp.reliability.lock import DirectoryLock
from megatron_bert_tp.training import evaluating
from tests.finetuning.runs import EVALUATE, FINETUNE, losses_of, result_of

BRIEF = "optimizer.precision=float32", "optimizer.steps=4", "run.evaluate_every=4"


def test_a_finished_run_that_was_made_longer_and_stopped_is_not_finished(message_of, files_of, tmp_path):
    """Its settings are the new ones, and its result was that of the old ones."""
    folder = tmp_path / "run"
    given = files_of(Kind.NUMBER).settings, f"run.directory={folder}", "optimizer.schedule=constant"
    given += "optimizer.precision=float32", "run.evaluate_every=10000"
    assert message_of(FINETUNE, *given, "optimizer.steps=3")[0] == 0
    assert result_of(folder)["best_step"] == 3
    longer = "optimizer.steps=10000", "run.allow_changes=true", "run.stop_after=1s"
    stood_at = [3]
    for _ in range(2):
        assert message_of(FINETUNE, *given, *longer)[0] == ExitCode.STOPPED
        assert not (folder / "result.json").exists()
        stood_at.append(len(losses_of(folder)))
    assert stood_at == sorted(set(stood_at)), "each start has gone on"


def test_the_folder_of_a_seed_belongs_to_one_job_at_a_time(message_of, files_of, tmp_path):
    seed = tmp_path / "run" / "seed_1"
    seed.mkdir(parents=True)
    given = files_of(Kind.NUMBER).settings, f"run.directory={tmp_path}/run", *BRIEF, "run.seeds=[1]"
    with DirectoryLock(seed):
        code, told = message_of(FINETUNE, *given)
        assert code == ExitCode.CANNOT_WRITE
        assert f"{seed} belongs to another job that is still running: process {os.getpid()}" in told
        assert not (seed / "metrics.jsonl").exists()
    assert message_of(FINETUNE, *given)[0] == 0


def test_an_evaluation_that_is_asked_to_stop_does_not_measure(message_of, files_of, tmp_path, monkeypatch):
    settings, folder = files_of(Kind.NUMBER).settings, tmp_path / "run"
    assert message_of(FINETUNE, settings, f"run.directory={folder}", *BRIEF)[0] == 0
    build = evaluating.build_pipeline

    def interrupted(*given, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return build(*given, **named)

    given = settings, f"model.weights={folder}", f"run.directory={tmp_path}/measured", *BRIEF
    with monkeypatch.context() as patches:
        patches.setattr(evaluating, "build_pipeline", interrupted)
        code, told = message_of(EVALUATE, *given)
    assert code == ExitCode.STOPPED
    assert "stopped before the predictions of validation (SIGTERM); the same command measures anew" in told
    assert not (tmp_path / "measured" / "predictions.validation.jsonl").exists()
    assert message_of(EVALUATE, *given)[0] == 0


def test_batches_made_by_other_processes_are_the_same(message_of, files_of, tmp_path):
    settings = files_of(Kind.TAGS).settings
    for workers in (0, 1):
        given = f"run.directory={tmp_path}/{workers}", f"run.data_workers={workers}", *BRIEF
        assert message_of(FINETUNE, settings, *given)[0] == 0
    assert losses_of(tmp_path / "0") == losses_of(tmp_path / "1")
    assert len(losses_of(tmp_path / "0")) == 4
