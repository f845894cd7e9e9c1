"""Runs pretraining with a fault in it: ``FAULT=... torchrun ... -m tests.faults.inject CONFIG.yaml overrides``.

    FAULT = kind[=amount] "@" key:value ["," key:value]...        several faults are parted by ";"

    kind     kill9 stop hang raise oom exit0 term usr1 int      what becomes of the process
             killall                                            SIGKILL to the launcher and all its ranks
             slow=SECONDS                                       sleeps so long, every time
             clock=SECONDS                                      the clock on the wall jumps
             nan inf flip                                       spoils a number of a tensor
             fail                                               an exception in the thread that saves
             file=BYTES                                         no file may grow larger: the disk is full
    step     the step in which it happens, from 1; 0 before the first; in a save the step that is saved
    rank     the global rank to which it happens; every rank without
    at       meet start                                         before it joins the others, opens the corpora
             step forward backward messages reduce optimizer evaluate; forward, if it is not given
             save write commit rename purge remove              of a save; remove: old files, under another name
    until    last step in which it happens (of slow and file); `step` alone without
    start    the start under torchrun --max-restarts in which it happens, from 0; any: in each

The package knows nothing of this: its methods are wrapped here, in the process of the test.
"""

import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch

from megatron_bert_tp.checkpoint import background, save
from megatron_bert_tp.config.command_line import run_command
from megatron_bert_tp.parallel.gradients import Gradients
from megatron_bert_tp.pipeline.executor import Executor
from megatron_bert_tp.pretrain import main
from megatron_bert_tp.training import pretraining, session, update
from megatron_bert_tp.training.trainer import Trainer

SIGNALS = {
    "kill9": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "usr1": signal.SIGUSR1,
    "int": signal.SIGINT,
}
IN_SAVES = ("save", "write", "commit", "rename", "purge", "remove")
"""Places that a thread may reach while the run is steps ahead."""


@dataclass
class Fault:
    """What happens, and where."""

    kind: str
    amount: float
    at: str = "forward"
    step: int = 1
    until: int = 0
    rank: int | None = None
    start: int | None = 0
    happened: int = field(default=0)

    @classmethod
    def parse(cls, text: str) -> "Fault":
        what, _, where = text.partition("@")
        kind, _, amount = what.partition("=")
        values = dict(pair.split(":") for pair in where.split(",") if pair)
        fault = cls(kind, float(amount or 0), values.get("at", "forward"), int(values.get("step", 1)))
        fault.until = int(values.get("until", fault.step))
        fault.rank = int(values["rank"]) if "rank" in values else None
        start = values.get("start", "0")
        fault.start = None if start == "any" else int(start)
        return fault

    def is_here(self, place: str, step: int) -> bool:
        own_rank, own_start = int(os.environ.get("RANK", 0)), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        return (
            self.at == place
            and self.step <= step <= self.until
            and self.rank in (None, own_rank)
            and self.start in (None, own_start)
            and (self.kind == "slow" or not self.happened)
        )

    def happen(self) -> None:
        self.happened += 1
        place = f"process {os.getpid()}, rank {os.environ.get('RANK', 0)}"
        print(f"fault: {self.kind} in {place}, at {time.time():.3f}", file=sys.stderr, flush=True)
        EFFECTS.get(self.kind, do_nothing)(self.amount)

    def pass_by(self, step: int) -> None:
        """Take back what lasts until a step that is over."""
        if self.kind == "file" and self.happened == 1 and step > self.until:
            self.happened += 1
            limit_files(resource.RLIM_INFINITY)


def limit_files(num_bytes: float) -> None:
    # Python ignores the signal that would come along with the error.
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(num_bytes), resource.RLIM_INFINITY))


def kill_launch(_: float) -> None:
    """The launcher first, so that it starts nothing anew; this process last."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = os.getppid()
        tasks = Path(f"/proc/{launcher}/task").glob("*/children")
        ranks = [int(number) for children in tasks for number in children.read_text().split()]
        for process in (launcher, *(rank for rank in ranks if rank != os.getpid())):
            os.kill(process, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def shift_clock(seconds: float) -> None:
    true_time = time.time
    time.time = lambda: true_time() + seconds


def hang(_: float) -> None:
    time.sleep(10_000)


def fail(_: float, error: Exception) -> None:
    raise error


def do_nothing(_: float) -> None:
    """A number is spoiled elsewhere."""


EFFECTS: dict[str, Callable[[float], object]] = {
    **{kind: lambda _, number=number: os.kill(os.getpid(), number) for kind, number in SIGNALS.items()},
    "killall": kill_launch,
    "slow": time.sleep,
    "clock": shift_clock,
    "hang": hang,
    "raise": partial(fail, error=ValueError("a fault in the hook of a user")),
    "oom": lambda _: torch.empty(1 << 50),
    "exit0": lambda _: os._exit(0),
    "fail": partial(fail, error=RuntimeError("a fault in the thread that saves")),
    "file": limit_files,
}


class Faults:
    """All faults of this process, and the step that it is in."""

    def __init__(self, text: str) -> None:
        self._faults = [Fault.parse(each) for each in text.split(";") if each]
        self.step = self.saved_step = 0

    def at(self, place: str) -> None:
        step = self.saved_step if place in IN_SAVES else self.step
        for fault in self._faults:
            fault.pass_by(self.step)
            if fault.is_here(place, step):
                fault.happen()

    def before(self, owner: Any, name: str, place: str) -> None:
        """Let what stands for ``place`` happen before each call of ``owner.name``."""
        called: Callable[..., Any] = getattr(owner, name)

        @wraps(called)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            self.at(place)
            return called(*arguments, **named)

        setattr(owner, name, wrapped)

    def spoiled(self, place: str) -> str | None:
        """The kind of number that is to be spoiled here now, if there is one."""
        for fault in self._faults:
            if fault.kind in ("nan", "inf", "flip") and fault.is_here(place, self.step):
                fault.happened += 1
                return fault.kind
        return None


def install(faults: Faults) -> None:
    """Wrap the places of the package at which faults happen."""
    train_step: Callable[..., Any] = Trainer.train_step

    @wraps(train_step)
    def counted(trainer: Trainer) -> Any:
        faults.step = trainer.steps_done + 1
        faults.at("step")
        return train_step(trainer)

    Trainer.train_step = counted  # type: ignore[method-assign]
    faults.before(Executor, "_forward", "forward")
    faults.before(Executor, "_backward", "backward")
    faults.before(Executor, "_launch", "messages")
    faults.before(Gradients, "reduce_and_norm", "reduce")
    faults.before(update, "step_", "optimizer")
    faults.before(Trainer, "measure", "evaluate")
    faults.before(session, "process_group", "meet")
    faults.before(pretraining, "open_texts", "start")
    _install_in_saves(faults)
    _spoil_numbers(faults)


def _install_in_saves(faults: Faults) -> None:
    save_checkpoint: Callable[..., Any] = background.save_checkpoint

    @wraps(save_checkpoint)
    def counted(root: Path, step: int, *arguments: Any, **named: Any) -> Any:
        faults.saved_step = step
        faults.at("save")
        return save_checkpoint(root, step, *arguments, **named)

    background.save_checkpoint = counted
    faults.before(save, "write_rectangles", "write")
    faults.before(save, "commit_checkpoint", "commit")
    faults.before(save, "publish", "rename")
    faults.before(save, "purge", "purge")
    faults.before(shutil, "rmtree", "remove")


def _spoil_numbers(faults: Faults) -> None:
    """Put nan or inf into a gradient before it is summed, or flip a bit of a parameter after a step."""
    reduce: Callable[..., Any] = Gradients.reduce_and_norm

    @wraps(reduce)
    def spoiled(gradients: Gradients, *arguments: Any, **named: Any) -> Any:
        kind = faults.spoiled("reduce")
        if kind is not None:
            gradients.buckets[0].flat.view(-1)[3] = float(kind)
        return reduce(gradients, *arguments, **named)

    Gradients.reduce_and_norm = spoiled  # type: ignore[method-assign]
    step: Callable[..., Any] = Trainer.train_step

    @wraps(step)
    def flipped(trainer: Trainer) -> Any:
        report = step(trainer)
        if faults.spoiled("after") == "flip":
            # Whole on every rank that holds the first stage.
            named = trainer.chunks[0].named_parameters()
            name, parameter = next(pair for pair in named if "position_embeddings" in pair[0])
            words = parameter.detach().view(torch.int32).view(-1)
            words[len(words) // 2] ^= 1 << 12
            print(f"fault: flipped a bit of {name}", file=sys.stderr, flush=True)
        return report

    Trainer.train_step = flipped  # type: ignore[method-assign]


if __name__ == "__main__":
    install(Faults(os.environ.get("FAULT", "")))
    sys.exit(run_command(main, usage=__doc__ or ""))
