"""The pure parts of `benchmarks/finetuning.py`; what it trains is tested in tests/finetuning."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from finetuning import STOPS, Stop
from finetuning_report import SIDES, add_row, comparison, read_rows, result_of
from finetuning_tasks import TRIALS, Start, Training, Way
from safetensors.torch import load_file, save_file

from megatron_bert_tp.config.dump import flat
from megatron_bert_tp.config.load import load_task
from megatron_bert_tp.errors import ExitCode
from megatron_bert_tp.formats.task_folder import BEST_MODEL, RESULT
from tests.finetuning.cases import write_model
from tests.sources import real_data

WAY = Way(
    start=Start(path=Path("weights"), weights="w", sizes="s"),
    data=Path("data"),
    out=Path("runs"),
    examples=10_000,
    epochs=3.0,
    seeds=(1, 2, 3),
    learning_rate="3e-4",
    dropout="0.1",
    processes=2,
    threads=1,
    device="cpu",
)


def settings(training: Training) -> dict[str, object]:
    """All settings of the command, as the command itself reads them."""
    at = training.command.index("megatron_bert_tp.finetune")
    path, *overrides = training.command[at + 1 :]
    return flat(load_task(Path(path), overrides, world_size=training.way.processes))


# Commands


@pytest.mark.parametrize("name", TRIALS)
def test_the_sides_differ_in_where_they_begin_alone(name):
    pretrained, random = (settings(Training(name, side, WAY)) for side in ("pretrained", "random"))
    differing = {path for path in pretrained if pretrained[path] != random[path]}
    assert differing == {"model.random_weights", "run.directory"}
    assert (pretrained["model.random_weights"], random["model.random_weights"]) == (False, True)


@pytest.mark.parametrize("name", TRIALS)
def test_the_command_has_what_was_asked_for(name):
    way = replace(WAY, examples=50, epochs=0.5, seeds=(7,), learning_rate="5e-4", dropout="0.0", processes=1)
    training = Training(name, "random", way)
    found = settings(training)
    assert found["data.most_train"] == 50
    assert found["optimizer.epochs"] == 0.5
    assert found["run.seeds"] == (7,)
    assert found["optimizer.learning_rate"] == 5e-4
    assert found["model.hidden_dropout_prob"] == found["model.attention_probs_dropout_prob"] == 0.0
    assert found["data.test"] is None
    assert found["run.directory"] == str(training.directory)
    assert "torch.distributed.run" not in training.command
    assert "--nproc_per_node=2" in Training(name, "random", WAY).command


@pytest.mark.parametrize("name", TRIALS)
def test_the_files_of_a_task_are_those_of_the_real_data(name):
    folder = real_data("glue").parent
    assert [file for file in (TRIALS[name].train, TRIALS[name].validation) if not (folder / file).exists()] == []


# What tells results apart


@pytest.mark.parametrize(
    "change",
    [{"examples": 9}, {"epochs": 1.0}, {"seeds": (1, 2)}, {"learning_rate": "1e-3"}, {"dropout": "0.0"}],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_have_another_folder(change):
    other = replace(WAY, **change)
    assert Training("trec", "random", other).directory != Training("trec", "random", WAY).directory


def test_the_layout_and_the_folders_do_not_matter_to_a_result():
    other = replace(WAY, processes=1, threads=2, data=Path("elsewhere"), out=Path("there"))
    assert Training("trec", "random", other).key == Training("trec", "random", WAY).key


def test_other_weights_matter_to_the_pretrained_side_alone():
    other = replace(WAY, start=replace(WAY.start, weights="x"))
    assert Training("trec", "random", other).key == Training("trec", "random", WAY).key
    assert Training("trec", "pretrained", other).key != Training("trec", "pretrained", WAY).key


def test_other_sizes_matter_to_the_random_side():
    other = replace(WAY, start=replace(WAY.start, sizes="x"))
    assert Training("trec", "random", other).key != Training("trec", "random", WAY).key


def test_a_start_is_known_by_the_weights_that_training_takes(tmp_path):
    """Of a finished run on a task that is its best model; other weights have the same sizes."""
    first, second = (write_finished_run(tmp_path / name, bias) for name, bias in (("a", 0.0), ("b", 1.0)))
    assert Start.at(first).weights == Start.at(first / BEST_MODEL).weights
    assert Start.at(first).weights != Start.at(second).weights
    assert Start.at(first).sizes == Start.at(second).sizes
    assert Start.at(first).path == first


def test_a_start_of_pickled_weights_is_known_by_these(tmp_path):
    for name, bias in (("a", 0.0), ("b", 1.0)):
        model = write_finished_run(tmp_path / name, bias) / BEST_MODEL
        torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
        (model / "model.safetensors").unlink()
    assert Start.at(tmp_path / "a").weights != Start.at(tmp_path / "b").weights


def write_finished_run(directory: Path, bias: float) -> Path:
    """What is left of a run whose checkpoints were removed."""
    (directory / BEST_MODEL).mkdir(parents=True)
    write_model(directory / BEST_MODEL)
    (directory / RESULT).write_text("{}")
    weights = load_file(directory / BEST_MODEL / "model.safetensors")
    weights["bert.embeddings.position_embeddings.weight"] += bias
    save_file(weights, directory / BEST_MODEL / "model.safetensors", metadata={"format": "pt"})
    return directory


# Rows


def result(seed: int, f1: float, accuracy: float, best_step: int) -> dict[str, object]:
    """One seed in summary.json, as docs/finetune.md has it."""
    metrics = {"validation": {"f1": f1, "accuracy": accuracy}}
    return {"seed": seed, "best_step": best_step, "metric": "f1", "metrics": metrics}


def write_run(directory: Path) -> None:
    seeds = {"1": result(1, 0.5, 0.6, 10), "2": result(2, 0.7, 0.4, 20)}
    spreads = {
        "f1": {"median": 0.6, "least": 0.5, "most": 0.7},
        "accuracy": {"median": 0.5, "least": 0.4, "most": 0.6},
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "summary.json").write_text(json.dumps({"seeds": seeds, "validation": spreads}))
    first, last = {"kind": "step", "seconds": 1.5}, {"kind": "step", "seconds": 0.25}
    lines = [json.dumps(record) for record in (first, {"kind": "evaluation", "loss": 1.0}, last)]
    for seed in seeds:
        (directory / f"seed_{seed}").mkdir(exist_ok=True)
        (directory / f"seed_{seed}" / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_a_row_is_read_from_what_a_run_leaves(tmp_path):
    write_run(tmp_path)
    assert result_of(tmp_path) == {
        "metric": "f1",
        "median": 0.6,
        "least": 0.5,
        "most": 0.7,
        "seeds": {"1": 0.5, "2": 0.7},
        "best_steps": {"1": 10, "2": 20},
        "all_metrics": {
            "f1": {"median": 0.6, "least": 0.5, "most": 0.7},
            "accuracy": {"median": 0.5, "least": 0.4, "most": 0.6},
        },
        "seconds_of_steps": 3.5,
    }


def side(name: str, median: float, least: float, most: float) -> dict[str, object]:
    values = {"metric": "accuracy", "median": median, "least": least, "most": most, "seconds_of_steps": 1.0}
    learned = [f"model.random_weights={SIDES[name]}", "optimizer.epochs=3"]
    return {**values, "settings": learned, "files": ["a"], "sizes": "s"}


def test_the_gain_is_that_of_the_medians_and_apart_is_every_seed():
    random = side("random", 0.5, 0.25, 0.75)
    apart, beside = side("pretrained", 1.0, 0.875, 1.0), side("pretrained", 1.0, 0.75, 1.0)
    assert comparison({"pretrained": apart, "random": random}) == {"gain": 0.5, "is_apart": True}
    assert comparison({"pretrained": beside, "random": random}) == {"gain": 0.5, "is_apart": False}


@pytest.mark.parametrize(
    "change", [{"settings": ["model.random_weights=true", "optimizer.epochs=1"]}, {"files": ["b"]}, {"sizes": "x"}]
)
def test_sides_that_were_made_otherwise_are_not_compared(change):
    pretrained = side("pretrained", 1.0, 1.0, 1.0)
    random = {**side("random", 0.5, 0.5, 0.5), **change}
    assert comparison({"pretrained": pretrained, "random": random}) == {}


def test_rows_are_kept_in_the_order_of_the_tasks_and_read_again(tmp_path):
    file = tmp_path / "new" / "rows.json"
    assert read_rows(file) == {}
    row = side("random", 0.5, 0.5, 0.5)
    for name, where in (("race", "random"), ("sst-2", "random"), ("race", "pretrained")):
        add_row(file, name, where, row, order=list(TRIALS))
    kept = read_rows(file)
    assert [(name, list(sides)) for name, sides in kept.items()] == [
        ("sst-2", ["random"]),
        ("race", ["random", "pretrained"]),
    ]
    assert kept["sst-2"]["random"] == row
    assert json.loads(file.read_text())["tasks"]["race"]["gain"] == 0
    assert sorted(path.name for path in file.parent.iterdir()) == ["rows.json", "rows.json.lock"]


def test_calls_side_by_side_lose_no_row(tmp_path):
    file, row = tmp_path / "rows.json", side("random", 0.5, 0.5, 0.5)
    with ThreadPoolExecutor(8) as threads:
        both = [(name, where) for name in TRIALS for where in SIDES]
        list(threads.map(lambda each: add_row(file, *each, row, order=list(TRIALS)), both))
    assert {name: set(sides) for name, sides in read_rows(file).items()} == {name: set(SIDES) for name in TRIALS}


# Signals


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in STOPS}
    yield Stop()
    for number, handler in before.items():
        signal.signal(number, handler)


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("is_born", [True, False], ids=["after its birth", "before it is known"])
def test_a_signal_reaches_the_training_and_ends_the_driver_as_stopped(stop, is_born, number):
    with sleeper() as child:
        if is_born:
            stop.hand_over(child)
        os.kill(os.getpid(), number)
        if not is_born:
            stop.hand_over(child)
        assert child.wait(timeout=20) == -number
    with pytest.raises(SystemExit) as ended:
        stop.end_if_asked()
    assert ended.value.code == ExitCode.STOPPED


def test_nothing_ends_that_was_not_asked_to(stop):
    stop.end_if_asked()
