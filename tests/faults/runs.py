"""Launches of pretraining with a fault in it, and what came of them, with times."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_bert_tp.checkpoint.read import Checkpoint
from tests.training.runs import ROOT

KINDS = ("weight", "exp_avg", "exp_avg_sq")
TINY = (
    "model.hidden_size=16",
    "model.num_hidden_layers=2",
    "model.intermediate_size=32",
    "run.evaluation_samples=0",
    "optimizer.steps=12",
    "run.save_every=4",
)
"""A run of 12 steps in a second or so, after a start of some seconds."""


@dataclass(frozen=True)
class Ended:
    """What a launch left behind; times are those of `time.time`."""

    code: int
    output: str
    outcome: dict[str, Any]
    """`exit.json`, or nothing."""
    began: float
    ended: float

    @property
    def fault_times(self) -> list[float]:
        return [float(text) for text in re.findall(r"fault: .*, at ([\d.]+)$", self.output, re.MULTILINE)]

    @property
    def seconds_to_detect(self) -> float:
        """From the fault to the first rank that tells how the run ended."""
        return float(self.outcome["time"]) - self.fault_times[0]

    @property
    def seconds_to_end(self) -> float:
        """From the fault to the end of the launcher."""
        return self.ended - self.fault_times[0]


def command(settings: Path, *overrides: str, processes: int, options: tuple[str, ...] = ()) -> list[str]:
    """Line that launches so many ranks; one rank needs no launcher."""
    torchrun = ["torch.distributed.run", f"--nproc_per_node={processes}", *options, "-m"] if processes > 1 else []
    return [sys.executable, "-m", *torchrun, "tests.faults.inject", str(settings), *TINY, *overrides]


def environment(fault: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": fault, "PYTHONPATH": str(ROOT)}


def launch(
    settings: Path,
    folder: Path,
    *overrides: str,
    fault: str = "",
    processes: int = 2,
    options: tuple[str, ...] = (),
    seconds: float = 120,
) -> Ended:
    """Run to the end, in ``folder``; a launch that takes longer than ``seconds`` fails the test."""
    began = time.time()
    done = subprocess.run(
        command(settings, f"run.directory={folder}", *overrides, processes=processes, options=options),
        cwd=ROOT,
        env=environment(fault),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    return Ended(done.returncode, done.stdout, outcome_of(folder), began, time.time())


def outcome_of(folder: Path) -> dict[str, Any]:
    path = folder / "exit.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def tensors_of(folder: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint of a run (the newest, or that of ``step``), its files verified."""
    path = folder if step is None else folder / "checkpoints" / f"step_{step:08d}"
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    return {
        f"{kind}/{name}": checkpoint.read(f"{kind}/{name}", (0,) * len(shape), shape)
        for kind in KINDS
        for name, shape in checkpoint.shapes(kind).items()
    }


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names whose bits are not the same."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name].view(torch.int32), other[name].view(torch.int32))]
