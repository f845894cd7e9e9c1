"""`benchmarks/repeat_positions.py`: positions that have been trained stand again at those that have not."""

import subprocess
import sys

import pytest
import torch
from repeat_positions import NAME, repeated
from safetensors.torch import load_file, save_file

from tests.sources import ROOT


def run(directory, trained):
    """The script on ``directory``."""
    script = str(ROOT / "benchmarks/repeat_positions.py")
    command = [sys.executable, script, str(directory), "--trained", str(trained)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_rows_by_hand():
    rows = repeated(torch.arange(12.0)[:, None], 5)[:, 0]
    assert rows.tolist() == [0, 1, 2, 3, 4, 2, 3, 1, 2, 3, 1, 2]


@pytest.mark.parametrize("trained", [3, 64, 128])
def test_neighbours_stay_neighbours(trained):
    """Position i + 1 is, but for the seams, the one that has been trained after position i."""
    rows = repeated(torch.arange(256)[:, None], trained)[:, 0]
    steps = rows[trained + 1 :] - rows[trained:-1]
    assert set(steps.tolist()) <= {1, 3 - trained}
    assert (rows == 0).sum() == 1


def test_only_new_rows_of_the_file_change(tmp_path):
    before = {NAME: torch.randn(16, 4), "other": torch.randn(3)}
    save_file(before, tmp_path / "model.safetensors", metadata={"format": "pt"})
    done = run(tmp_path, 8)
    assert done.returncode == 0, done.stderr
    after = load_file(tmp_path / "model.safetensors")
    assert torch.equal(after["other"], before["other"])
    assert torch.equal(after[NAME][:8], before[NAME][:8])
    assert torch.equal(after[NAME][8:14], before[NAME][[2, 3, 4, 5, 6, 1]])
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("trained", [2, 16])
def test_rows_that_are_not_there(tmp_path, trained):
    save_file({NAME: torch.randn(16, 4)}, tmp_path / "model.safetensors")
    done = run(tmp_path, trained)
    assert done.returncode == 1
    assert f"--trained {trained}:" in done.stderr
    assert "3 to 15" in done.stderr


def test_no_file(tmp_path):
    done = run(tmp_path, 8)
    assert done.returncode == 1
    assert "to-hf" in done.stderr
