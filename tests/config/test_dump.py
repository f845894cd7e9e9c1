"""A `Config` can be written, read back equal, and compared."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import yaml

from megatron_bert_tp.config.dump import differences, flat, to_dict, to_yaml, write_config
from megatron_bert_tp.config.load import load_config
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.config.settings import all_settings

Load = Callable[..., Config]
CONFIGS = Path(__file__).parents[2] / "configs"
ODD_TEXTS = [
    "1e-4",
    "yes",
    "null",
    "#",
    "a: b",
    "'",
    '"',
    "\\",
    "010",
    "naïve/日本/🙂",
    "[x",
    "{x",
    "~",
    "&a",
    "%",
    "!t",
]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_written_config_reads_back_equal_whatever_its_texts(load: Load, tmp_path: Path, text: str):
    doubled = text.replace("'", "''")
    config = load({"run.directory": f"'{doubled}'", "optimizer.learning_rate": "1.2345678901234567e-7"})
    assert config.run.directory == text
    write_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert [file.name for file in tmp_path.glob("config*")] == ["config.yaml"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load_and_round_trip(path: Path, tmp_path: Path):
    config = load_config(path)
    write_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_345m_is_nvidias_model_and_recipe():
    config = load_config(CONFIGS / "345m.yaml")
    model, optimizer = config.model, config.optimizer
    assert (model.num_hidden_layers, model.hidden_size, model.num_attention_heads) == (24, 1024, 16)
    assert (model.intermediate_size, model.max_position_embeddings, model.vocab_size) == (4096, 512, 30522)
    assert (config.parallel.tensor, config.parallel.pipeline) == (2, 2)
    assert (optimizer.global_batch, optimizer.learning_rate, optimizer.warmup_steps) == (1024, 1e-4, 10_000)
    assert (optimizer.steps, optimizer.weight_decay, optimizer.clip_norm) == (2_000_000, 0.01, 1.0)
    assert (config.objective.pairs, config.objective.masking.longest_span) == ("sop", 3)


def test_345m_runs_on_eight_processes_with_a_batch_of_eight():
    overrides = ["optimizer.global_batch=8", "optimizer.steps=2", "optimizer.warmup_steps=0"]
    assert load_config(CONFIGS / "345m.yaml", overrides, world_size=8).optimizer.global_batch == 8


def test_demo_fits_four_processes():
    config = load_config(CONFIGS / "demo.yaml", world_size=4)
    assert config.parallel.tensor * config.parallel.pipeline == 4


def test_config_holds_every_setting_once_and_is_frozen(load: Load):
    config = load()
    assert list(flat(config)) == list(all_settings(Config))
    with pytest.raises(FrozenInstanceError):
        config.run.log_every = 2


def test_defaults_are_those_of_the_schema(load: Load):
    values = flat(
        load({"model.max_position_embeddings": None, "data.sequence_length": None, "parallel.tensor": None})
    )
    given = {"optimizer.steps", "parallel.pipeline", "parallel.microbatch"}
    for path, row in all_settings(Config).items():
        if not row.is_required and path not in given:
            assert values[path] == row.default


def test_dict_is_plain_data_and_equals_what_any_yaml_reader_sees(load: Load):
    config = load({"optimizer.epsilon": "0.125", "model.layer_norm_eps": "0.25"})
    plain = to_dict(config)
    assert plain["data"]["split"] == [96.0, 4.0, 0.0]
    assert yaml.safe_load(to_yaml(config)) == plain


def test_differences_name_path_old_and_new(load: Load):
    old, new = load(), load({}, "objective.masking.probability=0.2", "run.directory=other")
    assert differences(old, old) == []
    assert differences(old, new) == [
        ("objective.masking.probability", 0.15, 0.2),
        ("run.directory", "runs/test", "other"),
    ]


@pytest.mark.parametrize("rate", ["2e-5", "1e-300", "1.5e-7", "3e16", "1e22", "0.1", "5"])
def test_rates_are_numbers_to_any_yaml_reader(load: Load, rate: str):
    """YAML 1.1 takes 2e-05, as Python writes it, for text."""
    config = load({"optimizer.learning_rate": rate, "data.weights": f"[{rate}]"})
    found = yaml.safe_load(to_yaml(config))
    assert found["optimizer"]["learning_rate"] == float(rate)
    assert found["data"]["weights"] == [float(rate)]
