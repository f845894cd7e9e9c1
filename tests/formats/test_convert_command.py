"""`python -m megatron_bert_tp.convert` as a user meets it."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from megatron_bert_tp.config.command_line import run_command
from megatron_bert_tp.convert import main
from megatron_bert_tp.errors import ExitCode
from megatron_bert_tp.formats.arguments import num_bytes
from tests.checkpoint.layouts import ODD, save
from tests.formats.conftest import assert_same_bytes, build


def convert(*arguments: str | Path) -> int:
    return run_command(main, usage="usage", arguments=[str(argument) for argument in arguments])


def test_both_ways_say_what_was_written_where(saved, tmp_path, capsys):
    original = saved()
    assert convert("from-hf", original, tmp_path / "checkpoint") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{tmp_path / 'checkpoint'}: checkpoint of step 0 without optimizer state, ")
    assert convert("to-hf", tmp_path / "checkpoint", tmp_path / "out") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{tmp_path / 'out'}: Hugging Face directory of step 0, ")
    assert last.split(", ")[1].endswith(" kB")
    assert_same_bytes(original, tmp_path / "out")


def test_the_newest_checkpoint_of_a_run_is_exported(tmp_path, capsys):
    for step in (10, 20):
        save(tmp_path / "run" / "checkpoints", ODD, step)
    assert convert("to-hf", tmp_path / "run", tmp_path / "out") == 0
    assert "of step 20" in capsys.readouterr().out


@pytest.mark.parametrize("direction", ["to-hf", "from-hf"])
def test_what_cannot_be_read_is_one_message_and_the_code_of_a_bad_checkpoint(tmp_path, capsys, direction):
    assert convert(direction, tmp_path / "nowhere", tmp_path / "out") == ExitCode.BAD_CHECKPOINT
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "nowhere" in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ["MegatronBertForCausalLM", "MegatronBertForTokenClassification"])
def test_options_choose_number_format_and_size_of_files(saved, tmp_path, architecture):
    original = saved(architecture=architecture)
    assert convert("from-hf", original, tmp_path / "checkpoint", "--dtype", "float64") == 0
    options = ("--dtype", "bfloat16", "--max-shard-size", "10KB")
    assert convert("to-hf", tmp_path / "checkpoint", tmp_path / "out", *options) == 0
    shards = [path.stat().st_size for path in (tmp_path / "out").glob("model-*.safetensors")]
    assert len(shards) > 3
    kind = getattr(transformers, architecture)
    model, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    expected = build(architecture).bfloat16().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("form", ["directory", "checkpoint"])
def test_megatron_and_back_is_the_identity(saved, tmp_path, capsys, form):
    directory = saved(intermediate_size=64, type_vocab_size=2, layer_norm_eps=1e-5)
    assert convert("from-hf", directory, tmp_path / "checkpoint") == 0
    source = directory if form == "directory" else tmp_path / "checkpoint"
    assert convert("to-ngc", source, tmp_path / "megatron", "--tensor", "2", "--pipeline", "5") == 0
    assert convert("inspect", tmp_path / "megatron") == 0
    assert "layout      tensor 2 x pipeline 5\n" in capsys.readouterr().out
    assert convert("from-ngc", tmp_path / "megatron", tmp_path / "out") == 0
    assert_same_bytes(directory, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), ("700", 700), ("3kb", 3000)]
)
def test_sizes_are_decimal_or_binary(text, size):
    assert num_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5XB", "0MB", "0.1B", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no size; give one such as 5GB"):
        num_bytes(text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["to-ngc", "a", "b", "--tensor", "0", "--pipeline", "1"],
        ["to-ngc", "a", "b", "--tensor", "2"],
        ["from-hf", "a", "b", "--dtype", "int8"],
        ["to-hf", "a", "b", "--max-shard-size", "much"],
        ["from-ngc", "a", "b", "--hidden-act", "tanh"],
        ["turn", "a", "b"],
        [],
    ],
)
def test_wrong_arguments_are_refused_with_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as raised:
        convert(*arguments)
    assert raised.value.code == 2
    told = capsys.readouterr().err
    assert "usage: python -m megatron_bert_tp.convert" in told
    assert told.count("usage:") == 1
    assert told.count("from-hf DIRECTORY OUT") <= 1


def test_help_names_all_ways():
    command = [sys.executable, "-m", "megatron_bert_tp.convert", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "to-hf CHECKPOINT OUT" in result.stdout
    assert "from-hf DIRECTORY OUT" in result.stdout
    assert "to-ngc SOURCE OUT --tensor T --pipeline P" in result.stdout
    assert "inspect PATH" in result.stdout


@pytest.mark.parametrize(
    ("command", "given", "told"),
    [
        ("to-hf", "original", "this is a Hugging Face directory; use from-hf or to-ngc"),
        ("from-ngc", "original", "this is a Hugging Face directory; use from-hf or to-ngc"),
        ("from-hf", "checkpoint", "this is a checkpoint of megatron_bert_tp; use to-hf or to-ngc"),
        ("from-ngc", "checkpoint", "this is a checkpoint of megatron_bert_tp; use to-hf or to-ngc"),
        ("from-hf", "ngc", "this is a checkpoint of Megatron-LM; use from-ngc"),
        ("to-ngc", "ngc", "this is a checkpoint of Megatron-LM; use from-ngc"),
    ],
)
def test_a_format_that_another_command_reads_is_told_with_it(saved, tmp_path, capsys, command, given, told):
    if given != "ngc":
        saved("original")
    if given == "checkpoint":
        assert convert("from-hf", tmp_path / "original", tmp_path / "checkpoint") == 0
    if given == "ngc":
        (tmp_path / "ngc" / "release" / "mp_rank_00").mkdir(parents=True)
        (tmp_path / "ngc" / "release" / "mp_rank_00" / "model_optim_rng.pt").touch()
    options = ("--tensor", "1", "--pipeline", "1") if command == "to-ngc" else ()
    assert convert(command, tmp_path / given, tmp_path / "out", *options) == ExitCode.BAD_CHECKPOINT
    assert f"{tmp_path / given}: {told}" in capsys.readouterr().err
