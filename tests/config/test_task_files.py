"""The settings files of configs/finetune, and how a file of a task is told from one of pretraining."""

import statistics
from pathlib import Path

import pytest
import yaml

from megatron_bert_tp.config.command_line import task_from_arguments
from megatron_bert_tp.config.dump import flat, to_dict, to_yaml, write_config
from megatron_bert_tp.config.load import load_any, load_config, load_task
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.config.settings import all_settings
from megatron_bert_tp.config.task_rules import model_problems
from megatron_bert_tp.config.task_schema import TaskRun
from megatron_bert_tp.config.task_table import TASKS
from megatron_bert_tp.errors import ConfigError, ExitCode
from megatron_bert_tp.outcome import main as tell_outcome
from megatron_bert_tp.reliability.outcome import Outcome, OutcomeFile
from tests.config.conftest import VALID, VALID_TASK, rendered

CONFIGS = Path(__file__).parents[2] / "configs"
FINETUNE = CONFIGS / "finetune"
FILES = sorted(FINETUNE.rglob("*.yaml"))

# Megatron-LM (Shoeybi et al. 2019), Table 6: batch, learning rate, epochs.
PAPER = {
    "336m": {
        "mnli": (128, 1e-5, 10),
        "qqp": (128, 5e-5, 12),
        "squad": (64, 3e-5, 2),
        "squad-v2": (48, 3e-5, 2),
        "race": (32, 2e-5, 3),
    },
    "1.3b": {
        "mnli": (128, 1e-5, 10),
        "qqp": (128, 3e-5, 12),
        "squad": (48, 3e-5, 2),
        "squad-v2": (64, 3e-5, 2),
        "race": (16, 1e-5, 3),
    },
    "3.9b": {
        "mnli": (128, 1e-5, 10),
        "qqp": (256, 4e-5, 12),
        "squad": (48, 1e-5, 2),
        "squad-v2": (48, 1e-5, 2),
        "race": (32, 2e-5, 3),
    },
}
ROWS = [(model, task) for model, tasks in PAPER.items() for task in tasks]
# The paper's models: layers, hidden size, heads of 64; four times the hidden size inside the MLP.
SHAPES = {"345m": (24, 1024, 16), "336m": (24, 1024, 16), "1.3b": (24, 2048, 32), "3.9b": (48, 2560, 40)}


def sizes_of(model: str) -> dict[str, int]:
    layers, hidden, heads = SHAPES[model]
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_of_a_task_loads_and_round_trips_for_both_purposes_on_eight_processes(path, tmp_path):
    for purpose in ("finetune", "evaluate"):
        config = load_task(path, purpose=purpose, world_size=8)
        write_config(config, tmp_path / "config.yaml")
        assert load_task(tmp_path / "config.yaml", purpose=purpose) == config
    assert yaml.safe_load(to_yaml(config)) == to_dict(config)
    assert list(flat(config)) == list(all_settings(TaskRun))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_fits_the_model_that_it_names_at_tensor_and_pipeline_sizes_up_to_two(path):
    model = load_task(path).model.weights.removeprefix("models/")
    own = load_task(path)
    assert model_problems(own, sizes_of(model)) == []
    split = load_task(path, ["parallel.tensor=2", "parallel.pipeline=2"], world_size=8)
    assert model_problems(split, sizes_of(model)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_begins_with_the_command_that_runs_it(path):
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert f"megatron_bert_tp.finetune {path.relative_to(CONFIGS.parent)}" in comments[-1]


def test_there_is_a_file_for_every_task_and_every_row_of_the_paper():
    names = {load_task(path).task.name for path in FINETUNE.glob("*.yaml")}
    assert names == set(TASKS) - {"trec-fine"}, "which differs from trec in its name alone"
    assert {path.stem for path in (FINETUNE / "paper").iterdir()} == {f"{model}-{task}" for model, task in ROWS}


def test_no_two_files_write_into_one_folder():
    folders = [load_task(path).run.directory for path in FILES]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize(("model", "task"), ROWS)
def test_recipe_of_the_paper_is_its_table_6(model, task):
    config = load_task(FINETUNE / "paper" / f"{model}-{task}.yaml")
    optimizer = config.optimizer
    assert (optimizer.global_batch, optimizer.learning_rate, optimizer.epochs) == PAPER[model][task]
    assert (optimizer.name, optimizer.steps, optimizer.schedule) == ("adamw", None, "linear")
    assert config.task.name == task.removesuffix("-v2")
    assert config.task.unanswerable == (True if task == "squad-v2" else None)
    assert config.model.weights == f"models/{model}"
    assert statistics.median(range(len(config.run.seeds or ()))) == 2, "the median is of five"
    assert config.run.metric == {"qqp": "accuracy"}.get(task), "the paper has accuracy where GLUE has F1 first"
    assert config.data.sequence_length == {"race": 512, "mnli": 128, "qqp": 128}.get(task, 384)


@pytest.mark.parametrize(("model", "task"), ROWS)
def test_recipe_says_which_numbers_are_the_papers_and_which_are_not(model, task):
    text = (FINETUNE / "paper" / f"{model}-{task}.yaml").read_text(encoding="utf-8")
    head = " ".join(text.partition("\nmodel:")[0].replace("#", " ").split())
    assert "Shoeybi et al. 2019, Table 6" in head
    assert "The paper does not say sequence length, warm-up, weight decay, dropout or precision" in head
    assert ("Tensor size" in head) == (model != "336m")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_steps_take_the_place_of_the_epochs_of_a_file_in_the_way_that_the_refusal_names(path):
    with pytest.raises(ConfigError, match=r"-> take one back: optimizer\.epochs=null"):
        load_task(path, ["optimizer.steps=4"])
    optimizer = load_task(path, ["optimizer.steps=4", "optimizer.epochs=null"]).optimizer
    assert (optimizer.steps, optimizer.epochs) == (4, None)


# World size


def test_world_size_is_checked_as_for_pretraining(load_a_task, task_complaint):
    for world in (4, 8, 16, 32):
        assert load_a_task(world_size=world) == load_a_task()
    message = task_complaint(world_size=6)
    assert "must be a multiple of 4 = parallel.tensor (2) x parallel.pipeline (2)" in message
    message = task_complaint(world_size=12)
    assert "must be a multiple of 24 = parallel.microbatch (8) x data size (3)" in message
    assert "use 48 or 72" in message


def test_world_size_of_the_launch_is_read(monkeypatch):
    launch = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    for name, text in {**launch, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, text)
    file = str(FINETUNE / "sst-2.yaml")
    assert task_from_arguments([file], "usage").task.name == "sst-2"
    with pytest.raises(ConfigError, match=r"world size = 3\n.*multiple of 2"):
        task_from_arguments([file, "parallel.tensor=2"], "usage")
    evaluation = [file, "data.train=null"]
    assert task_from_arguments(evaluation, "usage", "evaluate").data.train is None
    with pytest.raises(ConfigError, match="is required for fine-tuning"):
        task_from_arguments(evaluation, "usage")


@pytest.mark.parametrize("arguments", [[], ["task.name=rte"]])
def test_forgotten_settings_file_shows_the_usage_in_short(arguments):
    with pytest.raises(ConfigError, match=r"settings file .*\n\nusage: x CONFIG$"):
        task_from_arguments(arguments, "usage: x CONFIG\n\nlong text\n")


# Either kind of file


@pytest.mark.parametrize("path", [*CONFIGS.glob("*.yaml"), *FILES], ids=lambda path: path.stem)
def test_either_kind_of_file_is_known_by_its_sections(path):
    is_task = "finetune" in path.parts
    found = load_any(path, ["run.directory=elsewhere"])
    assert isinstance(found, TaskRun if is_task else Config)
    assert found.run.directory == "elsewhere"


@pytest.mark.parametrize("override", ["task.name=sst-2", "task={name: sst-2}", " task.name = sst-2"])
def test_the_section_of_tasks_may_come_from_the_command_line(write, override):
    path = write(rendered({key: text for key, text in VALID_TASK.items() if key != "task.name"}))
    found = load_any(path, [override])
    assert isinstance(found, TaskRun)
    assert found.task.name == "sst-2"


def test_errors_of_either_kind_are_those_of_its_own_schema(write):
    task = write(rendered({**VALID_TASK, "task.n_best": "0"}))
    with pytest.raises(ConfigError, match=r"task\.n_best = 0"):
        load_any(task)
    pretraining = write(rendered({**VALID, "objective.pairs": "nsp"}))
    with pytest.raises(ConfigError, match=r"multiple of 4"):
        load_any(pretraining, world_size=3)


def test_a_file_given_to_the_wrong_command_is_told_the_right_one(write):
    with pytest.raises(ConfigError, match=r"task .*\n.*is no setting\n.*megatron_bert_tp\.finetune"):
        load_config(write(rendered(VALID_TASK)))
    with pytest.raises(ConfigError, match=r"objective .*\n.*is no setting\n.*megatron_bert_tp\.pretrain"):
        load_task(write(rendered({**VALID, "objective.pairs": "nsp"})))


@pytest.mark.parametrize("path", [CONFIGS / "demo.yaml", FINETUNE / "sst-2.yaml"], ids=lambda path: path.stem)
def test_the_end_of_a_run_is_found_by_the_settings_of_either_kind(path, tmp_path, capsys):
    settings = [str(path), f"run.directory={tmp_path}"]
    assert tell_outcome(settings) == ExitCode.BUG
    OutcomeFile(tmp_path).claim(Outcome(code=ExitCode.STOPPED, cause="told to"))
    assert tell_outcome(settings) == ExitCode.STOPPED
    assert "code=75" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="must be a multiple of 3"):
        tell_outcome(["--processes=4", *settings, "parallel.tensor=3", "parallel.pipeline=1"])
