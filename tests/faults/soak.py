"""A long run that is hit again and again: ``python -m tests.faults.soak`` (make soak).

300 steps at tensor 2 x pipeline 2, saved every 5, under ``torchrun --max-restarts``.  5 to 30 s after the first
step that follows a start comes a fault, drawn from a seed: a killed rank, a stopped rank, a rank that is told to
end, a disk that is full, a checkpoint file with a flipped bit (and a kill, so that someone reads it).  At the end
every bit of weights and moments must be that of a run in which nothing happened.
"""

import argparse
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.runs import differing, tensors_of
from tests.training.runs import ROOT, make_data, records, without_times

LAYOUT = ("parallel.tensor=2", "parallel.pipeline=2")
NUM_RANKS = 4
KINDS = ("kill", "stop", "term", "full", "flip")
DELAYS = (5.0, 30.0)
"""Seconds from the first step after a start to the fault."""


@dataclass
class Story:
    """What has happened to the run: faults by kind, the steps done at each, and the starts of all ranks."""

    faults: dict[str, int] = field(default_factory=dict)
    at_step: list[int] = field(default_factory=list)
    starts: int = 0


class Soak:
    """One run with faults, from its start to its end."""

    def __init__(self, launch: list[str], folder: Path, log: Path, *, seed: int) -> None:
        self._folder, self._draws, self.story = folder, random.Random(seed), Story()
        # Through a pipe: a rank that may write no large file still tells what is wrong.
        self._cat = subprocess.Popen(["tee", str(log)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        self._launcher = subprocess.Popen(
            launch, cwd=ROOT, env=environment(), stdout=self._cat.stdin, stderr=self._cat.stdin
        )

    def run(self, deadline: float) -> Story:
        """Hit the run until it is finished; TimeoutError and RuntimeError where it never is."""
        ranks: list[int] = []
        while ranks := self._first_step_of_others(ranks, deadline):
            self.story.starts += 1
            self._wait(self._draws.uniform(*DELAYS))
            kind, victim = self._draws.choice(KINDS), self._draws.choice(ranks)
            if not self._is_over():
                self.story.at_step.append(self._steps_done())
                self._harm(kind, victim)
                self.story.faults[kind] = self.story.faults.get(kind, 0) + 1
        self._launcher.wait(60)
        assert self._cat.stdin is not None
        self._cat.stdin.close()
        self._cat.wait(60)
        if self._launcher.returncode:
            raise RuntimeError(f"the launcher gave up: {self.story}")
        return self.story

    def _first_step_of_others(self, former: list[int], deadline: float) -> list[int]:
        """Processes of a new start, once they have done a step; none when the run is over."""
        before: int | None = None
        while not self._is_over():
            if time.monotonic() > deadline:
                self._launcher.send_signal(signal.SIGTERM)
                raise TimeoutError(f"not finished: {self.story}")
            ranks, done = self._ranks(), self._steps_done()
            is_new = len(ranks) == NUM_RANKS and not set(ranks) & set(former)
            if is_new and before is not None and done > before:
                return ranks
            before = done if is_new else None  # on resuming, records are cut off
            time.sleep(0.05)
        return []

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._is_over():
            time.sleep(0.05)

    def _harm(self, kind: str, victim: int) -> None:
        with suppress(ProcessLookupError):  # the run has just ended
            if kind == "full":
                # The victim can write no file of more than 1000 bytes: to it, the disk is full.
                resource.prlimit(victim, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
                return
            if kind == "flip":
                self._flip()
            os.kill(victim, {"stop": signal.SIGSTOP, "term": signal.SIGTERM}.get(kind, signal.SIGKILL))

    def _flip(self) -> None:
        """Flip a bit of the newest checkpoint, if there is one yet."""
        files = sorted((self._folder / "checkpoints").glob("step_????????/*.safetensors"))
        if files:
            path = self._draws.choice([file for file in files if file.parent == files[-1].parent])
            place, bit = self._draws.randrange(path.stat().st_size), self._draws.randrange(8)
            with path.open("r+b") as file:
                file.seek(place)
                (byte,) = file.read(1)
                file.seek(place)
                file.write(bytes([byte ^ 1 << bit]))

    def _ranks(self) -> list[int]:
        try:
            children = Path(f"/proc/{self._launcher.pid}/task/{self._launcher.pid}/children").read_text()
        except OSError:
            return []
        return [int(number) for number in children.split()]

    def _steps_done(self) -> int:
        try:
            rows = records(self._folder, "step")
        except OSError:
            return 0
        return int(rows[-1]["step"]) if rows else 0

    def _is_over(self) -> bool:
        return self._launcher.poll() is not None


def command(settings: Path, folder: Path, steps: int, *options: str) -> list[str]:
    """Line that launches four ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4", *options]
    overrides = (
        *LAYOUT,
        f"run.directory={folder}",
        f"optimizer.steps={steps}",
        "run.save_every=5",
        "run.keep_last=3",
        "run.evaluation_samples=0",
        "run.step_timeout_seconds=10",
        "model.num_hidden_layers=4",
        "model.hidden_size=64",
        "model.intermediate_size=256",
        "optimizer.global_batch=32",
    )
    return [*torchrun, "-m", "megatron_bert_tp.pretrain", str(settings), *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def main() -> None:
    """Run both, compare, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3000, help="longest time of the run with faults")
    parser.add_argument("--json", type=Path, help="where to write what happened")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        root = Path(name)
        settings = make_data(root)
        truth, folder, log = root / "undisturbed", root / "soaked", root / "soak.log"
        began = time.monotonic()
        subprocess.run(command(settings, truth, given.steps), cwd=ROOT, env=environment(), check=True)
        middle = time.monotonic()
        launch = command(settings, folder, given.steps, "--max-restarts=1000")
        story = Soak(launch, folder, log, seed=given.seed).run(middle + given.seconds)
        ended = time.monotonic()
        num_run = len(re.findall(rf"^step +\d+/{given.steps} ", log.read_text(), re.MULTILINE))
        wrong = differing(tensors_of(folder), tensors_of(truth))
        same_curve = without_times(records(folder, "step")) == without_times(records(truth, "step"))
    report = {
        "steps": given.steps, "seed": given.seed, "faults": story.faults, "survived": sum(story.faults.values()),
        "starts": story.starts, "faults_at_step": story.at_step, "steps_repeated": num_run - given.steps,
        "seconds_undisturbed": round(middle - began, 1), "seconds": round(ended - middle, 1),
        "tensors_that_differ": wrong, "same_curve": same_curve,
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(wrong) or not same_curve)


if __name__ == "__main__":
    main()
