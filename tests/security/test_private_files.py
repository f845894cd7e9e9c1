"""What a run and its tools write is their user's alone, and holds nothing of the environment."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sources import ROOT
from tests.training.runs import make_data

SECRET = "hf_CanaryOfTheTests0123456789"
COMMANDS = (
    ("megatron_bert_tp.pretrain", "{data}/config.yaml", "optimizer.steps=2", "optimizer.warmup_steps=0"),
    ("megatron_bert_tp.convert", "to-hf", "{data}/run", "{data}/exported"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run and an export of it, made under a umask of 022 with a secret in the environment."""
    made = tmp_path_factory.mktemp("private")
    make_data(made)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_TOKEN": SECRET, "AWS_SECRET_ACCESS_KEY": SECRET}
    said = []
    for module, *arguments in COMMANDS:
        command = [sys.executable, "-m", module, *(text.format(data=made) for text in arguments)]
        done = subprocess.run(
            command, cwd=ROOT, env=variables, umask=0o022, capture_output=True, check=False, timeout=200
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout + done.stderr)
    (made / "said").write_bytes(b"".join(said))
    return made


def written(folder: Path) -> list[Path]:
    """All that the commands have made: the run, the export, the index of samples."""
    roots = [folder / "run", folder / "exported", *folder.glob("corpus.samples*")]
    return [path for root in roots for path in (root, *root.rglob("*"))]


def test_all_files_are_0600_and_all_folders_0700(folder):
    paths = written(folder)
    names = {path.name for path in paths}
    assert names >= {"exit.json", "metrics.jsonl", "config.yaml", "manifest.json", "latest", "lock", "exported"}
    assert any(path.suffix == ".safetensors" for path in paths)
    assert any(path.suffix == ".samples" for path in paths)
    wrong = {
        str(path): oct(stat.S_IMODE(path.stat().st_mode))
        for path in paths
        if stat.S_IMODE(path.stat().st_mode) & 0o077
    }
    assert wrong == {}


def test_no_file_and_no_line_of_output_holds_a_secret_of_the_environment(folder):
    for path in [*written(folder), folder / "said"]:
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
