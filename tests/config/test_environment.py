"""The place of a process comes from torchrun's variables, checked."""

import ast
from pathlib import Path

import pytest

import megatron_bert_tp.config
from megatron_bert_tp.config.environment import LaunchEnvironment, environment_from, read_environment
from megatron_bert_tp.errors import ConfigError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


def test_without_a_launcher_a_process_is_rank_0_of_1():
    alone = environment_from({"MASTER_ADDR": "leftover", "LOCAL_RANK": "5", "SLURM_PROCID": "7"})
    assert alone == LaunchEnvironment()
    assert (alone.rank, alone.world_size, alone.is_first, alone.is_launched) == (0, 1, True, False)


def test_torchruns_variables_are_read():
    assert environment_from(TORCHRUN) == LaunchEnvironment(
        rank=3,
        world_size=8,
        local_rank=1,
        local_world_size=2,
        master_address="node0",
        master_port=29500,
        is_launched=True,
    )


def test_one_launched_process_needs_no_more_than_rank_and_world_size():
    assert environment_from({"RANK": "0", "WORLD_SIZE": "1"}).is_launched


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("RANK", "abc"),
        ("RANK", "-1"),
        ("RANK", "8"),
        ("RANK", "1.0"),
        ("RANK", "\u0661"),
        ("RANK", "9" * 5000),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "two"),
        ("LOCAL_RANK", "2"),
        ("LOCAL_RANK", "x"),
        ("LOCAL_WORLD_SIZE", "0"),
        ("MASTER_PORT", "http"),
        ("MASTER_PORT", "65536"),
    ],
)
def test_bad_value_is_told_with_its_name(name: str, text: str):
    with pytest.raises(ConfigError, match=f"{name}={text}"):
        environment_from({**TORCHRUN, name: text})


@pytest.mark.parametrize("name", TORCHRUN)
def test_half_a_launch_is_refused_with_what_is_missing(name: str):
    with pytest.raises(ConfigError, match=f"{name}.* is missing .*start with torchrun"):
        environment_from({key: text for key, text in TORCHRUN.items() if key != name})


def test_environment_of_the_process_is_what_is_read(monkeypatch: pytest.MonkeyPatch):
    for name, text in TORCHRUN.items():
        monkeypatch.setenv(name, text)
    assert read_environment() == environment_from(TORCHRUN)


def reads_environment(path: Path) -> bool:
    """Whether a module uses the environment for more than setting a variable."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    written = {node.value for node in nodes if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)}
    uses = {node for node in nodes if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")}
    return bool(uses - written)


def test_no_other_module_reads_the_environment():
    package = Path(megatron_bert_tp.config.__path__[0]).parent
    assert [path.name for path in package.rglob("*.py") if reads_environment(path)] == ["environment.py"]
