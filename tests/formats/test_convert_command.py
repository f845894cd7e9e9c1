"""`python -m megatron_bert_tp.convert` as a user meets it."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bert_tp.config.command_line import run_command
from megatron_bert_tp.convert import main
from tests.checkpoint.layouts import ODD, save
from tests.formats.conftest import assert_same_bytes


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
def test_what_cannot_be_read_is_one_message_and_exit_code_2(tmp_path, capsys, direction):
    assert convert(direction, tmp_path / "nowhere", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "nowhere" in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_help_names_both_ways():
    command = [sys.executable, "-m", "megatron_bert_tp.convert", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "to-hf CHECKPOINT OUT" in result.stdout
    assert "from-hf DIRECTORY OUT" in result.stdout
