"""Launches of pretraining with a fault in it, and what came of them, with times."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest
import torch

from megatron_bert_tp.checkpoint.read import Checkpoint
from tests.launch.running import end_family
from tests.training.runs import ROOT, records, without_times

T = TypeVar("T")
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


# An interpreter that runs this package's entry point with faults wherever it is asked to run it.
WITH_FAULTS = f"""#!/usr/bin/env bash
exec {sys.executable} "${{@/#megatron_bert_tp.pretrain/tests.faults.inject}}"
"""


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


class Running:
    """A launch that goes on while the test does something to it; its output goes into a file beside its folder.

    ``with start(...) as running``: a test that fails leaves no process behind.
    """

    def __init__(self, line: list[str], folder: Path, variables: dict[str, str]) -> None:
        self._folder, self._began = folder, time.time()
        self._output = folder.with_name(f"{folder.name}.output")
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                line, cwd=ROOT, env=variables, stdout=output, stderr=output, preexec_fn=_hear_interruptions
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.kill()

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait_for_step(self, step: int) -> None:
        """Until that many steps are in metrics.jsonl."""
        self.wait_for(lambda: num_steps(self._folder) >= step)

    def wait_for_fault(self, text: str) -> None:
        """Until a fault that begins like this has happened."""
        self.wait_for(lambda: f"fault: {text}" in self.output)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"in vain: {self.output}")
            time.sleep(0.01)

    def send(self, number: signal.Signals) -> float:
        """Send a signal to the process that was started, which may be a launcher; when (of `time.time`)."""
        self.process.send_signal(number)
        return time.time()

    def freeze(self) -> None:
        """Stop the process, of one rank: it does nothing more until it gets SIGCONT."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)  # the signal comes to its threads one by one

    def end(self, seconds: float = 60) -> Ended:
        """What has come of it once it has ended by itself."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"still runs: {self.output}")
        return Ended(code, self.output, outcome_of(self._folder), self._began, time.time())

    def kill(self) -> None:
        """The process and all that it has started."""
        if self.process.poll() is not None:
            return
        end_family(self.process.pid)
        self.process.wait()


def _hear_interruptions() -> None:
    # What a shell starts in the background ignores SIGINT, and no script that it starts can trap it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(
    settings: Path,
    folder: Path,
    *overrides: str,
    fault: str = "",
    processes: int = 2,
    options: tuple[str, ...] = (),
) -> Running:
    """Start what `launch` runs to the end."""
    line = command(settings, f"run.directory={folder}", *overrides, processes=processes, options=options)
    return Running(line, folder, environment(fault))


def start_script(settings: Path, folder: Path, *overrides: str, fault: str = "", **variables: str) -> Running:
    """Start two ranks with launch/torchrun.sh."""
    python = folder.with_name(f"{folder.name}.python")
    python.write_text(WITH_FAULTS)
    python.chmod(0o755)
    fixed = {"PYTHON": str(python), "NPROC": "2"}
    line = [str(ROOT / "launch" / "torchrun.sh"), str(settings), *tiny((f"run.directory={folder}", *overrides))]
    return Running(line, folder, {**environment(fault), **fixed, **variables})


def num_steps(folder: Path) -> int:
    """Steps in metrics.jsonl, in which a line may be half written."""
    path = folder / "metrics.jsonl"
    return path.read_text().count('"kind": "step"') if path.exists() else 0


def command(settings: Path, *overrides: str, processes: int, options: tuple[str, ...] = ()) -> list[str]:
    """Line that launches so many ranks; one rank needs no launcher."""
    torchrun = ["torch.distributed.run", f"--nproc_per_node={processes}", *options, "-m"] if processes > 1 else []
    return [sys.executable, "-m", *torchrun, "tests.faults.inject", str(settings), *tiny(overrides)]


def tiny(overrides: tuple[str, ...]) -> list[str]:
    """These, and those of `TINY` that none of them takes the place of: none may be given twice."""
    given = {override.partition("=")[0] for override in overrides}
    return [*(each for each in TINY if each.partition("=")[0] not in given), *overrides]


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


def on_a_quiet_machine(run: Callable[[], T], is_in_time: Callable[[T], bool], *, anew: Path | None = None) -> T:
    """What the first of four attempts gives that is in time, else the last: other work can delay any of them.

    Each of them finds no folder ``anew``.
    """
    for _ in range(4):
        if anew is not None:
            shutil.rmtree(anew, ignore_errors=True)
        if is_in_time(found := run()):
            break
    return found


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


def assert_ends_like(folder: Path, truth: Path) -> None:
    """The same losses in every step and evaluation, and the same bits in every tensor."""
    for kind in ("step", "evaluation"):
        assert without_times(records(folder, kind)) == without_times(records(truth, kind))
    assert differing(tensors_of(folder), tensors_of(truth)) == []
