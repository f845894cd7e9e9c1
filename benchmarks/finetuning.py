"""What pretraining is worth: seven tasks, fine-tuned from weights and from random ones of the same sizes.

    python benchmarks/finetuning.py --weights DIR --data DIR --out RUNS --json FILE [--tasks NAME...]
        [--only pretrained|random] [--examples 10000] [--epochs 3] [--seeds 1 2 3] [--rate 3e-4] [--dropout 0.1]
        [--processes 2] [--threads 1]

``--weights`` is anything that `model.weights` takes, ``--data`` has the folders that docs/results.md lists.  Each
task is ``python -m megatron_bert_tp.finetune configs/finetune/<task>.yaml``, under torchrun with more processes,
twice, one after the other: from the weights, and with model.random_weights=true.  All else is the same for both.
After each, FILE has its row.

Two calls, one with ``--only pretrained`` and one with ``--only random``, may run side by side with the same FILE.
Ctrl-C, SIGTERM and SIGHUP go to the training in progress, which saves and ends; the same command goes on there.
A row is made once for its settings and weights: other ones have folders of their own in RUNS.  Checkpoints of what
is done are removed; models, metrics and predictions stay.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from finetuning_report import SIDES, add_row, read_rows, result_of, show
from finetuning_tasks import CONFIGS, TRIALS, Start, Training, Way

from megatron_bert_tp.config.load import load_task
from megatron_bert_tp.errors import ExitCode, MegatronBertError


def main() -> None:
    """Train what has no row yet, and print the table."""
    given = arguments()
    os.nice(given.nice)
    trainings = trainings_of(given)
    stop = Stop()
    for training in trainings:
        row = read_rows(given.json).get(training.name, {}).get(training.side, {})
        if row.get("key") == training.key:
            print(f"{training.name} {training.side}: is already in {given.json}")
            continue
        print(f"{training.name} {training.side}: {training.directory}", flush=True)
        train(training, stop)
        add_row(given.json, training.name, training.side, row_of(training), order=list(TRIALS))
        remove_checkpoints(training)
        stop.end_if_asked()
    show(read_rows(given.json))


def trainings_of(given: argparse.Namespace) -> list[Training]:
    """What is to be trained, in this order; ends this process where some of it cannot be."""
    try:
        start = Start.at(given.weights)
    except MegatronBertError as error:
        sys.exit(str(error))
    way = Way(
        start=start,
        data=given.data.resolve(),
        out=given.out.resolve(),
        examples=given.examples,
        epochs=given.epochs,
        seeds=tuple(given.seeds),
        learning_rate=given.rate,
        dropout=given.dropout,
        processes=given.processes,
        threads=given.threads,
        device=given.device,
    )
    sides = [given.only] if given.only else list(SIDES)
    trainings = [Training(name, side, way) for name in given.tasks for side in sides]
    if problems := list(problems_of(trainings)):
        sys.exit("\n".join(problems))
    return trainings


def arguments() -> argparse.Namespace:
    """What is given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="Hugging Face directory, run or checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--json", type=Path, required=True, help="the results, row by row")
    parser.add_argument("--tasks", nargs="+", choices=TRIALS, default=list(TRIALS), metavar="NAME")
    parser.add_argument("--only", choices=SIDES, help="one side alone")
    parser.add_argument("--examples", type=int, default=10_000, help="at most so many to learn from")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rate", default="3e-4", help="learning rate after the warm-up (default 3e-4)")
    parser.add_argument("--dropout", default="0.1", help="share of zeros in all layers (default 0.1)")
    parser.add_argument("--processes", type=int, default=2, help="replicas (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process (default 1)")
    parser.add_argument("--device", default="cpu", help="run.device (default cpu)")
    parser.add_argument("--nice", type=int, default=0, metavar="N", help="give way to other processes")
    return parser.parse_args()


def problems_of(trainings: list[Training]) -> Iterator[str]:
    """Settings that are wrong and files that are missing, hours before they are needed."""
    for training in trainings:
        try:
            config = load_task(
                CONFIGS / training.trial.settings, training.overrides, world_size=training.way.processes
            )
        except MegatronBertError as error:
            yield f"{training.name} {training.side}: {error}"
            continue
        files = (*(config.data.train or ()), *(config.data.validation or ()))
        yield from (f"{training.name}: {file} is not there" for file in files if not Path(file).exists())


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Stop:
    """Hears `STOPS` from its making on, and passes them to the training in progress."""

    child: subprocess.Popen[bytes] | None = None
    asked: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for number in STOPS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self.asked.append(number)
        if self.child is not None:
            self.child.send_signal(number)

    def hand_over(self, child: subprocess.Popen[bytes]) -> None:
        """Signals go to ``child`` from now on, and so does one that came while it was born."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # one that came in between would be passed twice
        self.child = child
        for number in self.asked:
            child.send_signal(number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    def end_if_asked(self) -> None:
        """End this process with the code of a stopped run."""
        if self.asked:
            print("stopped; the same command goes on", file=sys.stderr)
            sys.exit(ExitCode.STOPPED)


def train(training: Training, stop: Stop) -> None:
    """Run it to its end; ends this process where it was stopped or has failed."""
    # In a session of its own a Ctrl-C reaches it once, through `stop`: the second one would not let it save.
    child = subprocess.Popen(
        training.command,
        env={**os.environ, "OMP_NUM_THREADS": str(training.way.threads)},
        start_new_session=True,
    )
    stop.hand_over(child)
    code = child.wait()
    stop.child = None
    if not code:
        return
    stop.end_if_asked()
    sys.exit(
        f"{training.name} {training.side} has ended with code {code}; its message stands above, and the same "
        "command goes on when its cause is gone"
    )


def row_of(training: Training) -> dict[str, object]:
    """Result of a training that is done, and all that tells how it was made."""
    return {
        **result_of(training.directory),
        "key": training.key,
        "start": training.start_id,
        "sizes": training.way.start.sizes,
        "files": training.files,
        "settings": training.learned,
        "processes": training.way.processes,
        "threads": training.way.threads,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("megatron-bert-tp", "torch")},
        },
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def remove_checkpoints(training: Training) -> None:
    """Remove what only an unfinished run needs: a hundred megabytes for each seed."""
    for checkpoints in training.directory.glob("seed_*/checkpoints"):
        shutil.rmtree(checkpoints)


if __name__ == "__main__":
    main()
