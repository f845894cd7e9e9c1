"""What pretraining is worth: seven tasks, fine-tuned from weights and from random ones of the same sizes.

    python benchmarks/finetuning.py --weights DIR --data DIR --out RUNS --json FILE [--tasks NAME...]
        [--only pretrained|random] [--examples 10000] [--epochs 3] [--seeds 1 2 3] [--processes 2] [--threads 1]

``--weights`` is anything that `model.weights` takes, ``--data`` has the folders that docs/results.md lists.  Each
task is ``python -m megatron_bert_tp.finetune configs/finetune/<task>.yaml`` (under torchrun with several processes)
twice, one after the other: from the weights, and with model.random_weights=true.  All else is the same for both.
After each, FILE has its row.

Ctrl-C and SIGTERM go to the training in progress, which saves and ends; the same command goes on there.  A row is
made once for its settings and weights: other ones have folders of their own in RUNS.  Checkpoints of what is done
are removed; models, metrics and predictions stay.
"""

import argparse
import hashlib
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

from finetuning_report import SIDES, Rows, read_rows, result_of, show, write_rows

from megatron_bert_tp.checkpoint.directories import candidates
from megatron_bert_tp.config.load import load_task
from megatron_bert_tp.errors import ExitCode, MegatronBertError

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "finetune"
SAME = (
    "data.test=null",
    "optimizer.global_batch=32",
    "optimizer.warmup_share=0.1",
    "optimizer.precision=float32",
    "parallel.packing=bins",
    "parallel.microbatch_tokens=4096",
)
"""Settings of all tasks and both sides."""


@dataclass(frozen=True)
class Trial:
    """A task: its settings file, its data below ``--data``, and what a small model needs otherwise."""

    settings: str
    train: str
    validation: str
    sequence_length: int
    learning_rate: str = "5e-4"
    more: tuple[str, ...] = ()


TRIALS = {
    "sst-2": Trial("sst-2.yaml", "glue/SST-2/train.tsv", "glue/SST-2/dev.tsv", 64),
    "trec": Trial("trec.yaml", "trec_qc/train.txt", "trec_qc/test.txt", 32),
    "mrpc": Trial("mrpc.yaml", "glue/MRPC/train.tsv", "glue/MRPC/dev.tsv", 128),
    "sts-b": Trial("sts-b.yaml", "glue/STS-B/train.tsv", "glue/STS-B/dev.tsv", 96),
    "wnut-17": Trial("ner.yaml", "wnut17/wnut17train.conll", "wnut17/emerging.dev.conll", 128),
    "squad": Trial(
        "squad.yaml", "squad/train-v1.1.first4370.json", "squad/xquad.en.json", 192, "3e-4", ("task.overlap=64",)
    ),
    "race": Trial("race.yaml", "race_layout/train", "race_layout/dev", 192),
}


@dataclass(frozen=True)
class Way:
    """What all trainings of a call share; ``weights_id`` tells the content of ``weights``."""

    weights: Path
    weights_id: str
    data: Path
    out: Path
    examples: int
    epochs: float
    seeds: tuple[int, ...]
    processes: int
    threads: int
    device: str


@dataclass(frozen=True)
class Training:
    """One task on one side, for all seeds."""

    name: str
    side: str
    way: Way

    @property
    def trial(self) -> Trial:
        """Row of the table."""
        return TRIALS[self.name]

    @property
    def learned(self) -> tuple[str, ...]:
        """Overrides that decide what comes out."""
        return (
            *SAME,
            f"model.random_weights={SIDES[self.side]}",
            f"data.sequence_length={self.trial.sequence_length}",
            f"data.most_train={self.way.examples}",
            f"optimizer.learning_rate={self.trial.learning_rate}",
            f"optimizer.epochs={self.way.epochs:g}",
            f"run.seeds=[{', '.join(map(str, self.way.seeds))}]",
            *self.trial.more,
        )

    @property
    def key(self) -> str:
        """What tells its result from those of other settings, data files and weights."""
        file = (CONFIGS / self.trial.settings).read_text(encoding="utf-8")
        parts = (file, *self.learned, self.trial.train, self.trial.validation, self.way.weights_id)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]

    @property
    def directory(self) -> Path:
        """Its own folder in RUNS."""
        return self.way.out / self.name / f"{self.side}-{self.key}"

    @property
    def overrides(self) -> tuple[str, ...]:
        """All settings that differ from the file."""
        return (
            *self.learned,
            f"model.weights={self.way.weights}",
            f"data.train={self.way.data / self.trial.train}",
            f"data.validation={self.way.data / self.trial.validation}",
            f"run.directory={self.directory}",
            "run.keep_last=1",
            f"run.device={self.way.device}",
        )

    @property
    def command(self) -> list[str]:
        """What trains it; torchrun by its module, so that it is this environment's."""
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={self.way.processes}", "-m"]
        launcher = torchrun if self.way.processes > 1 else []
        file = str(CONFIGS / self.trial.settings)
        return [sys.executable, "-m", *launcher, "megatron_bert_tp.finetune", file, *self.overrides]


def main() -> None:
    """Train what has no row yet, and print the table."""
    given = arguments()
    os.nice(given.nice)
    way = Way(
        weights=given.weights.resolve(),
        weights_id=weights_id(given.weights),
        data=given.data.resolve(),
        out=given.out.resolve(),
        examples=given.examples,
        epochs=given.epochs,
        seeds=tuple(given.seeds),
        processes=given.processes,
        threads=given.threads,
        device=given.device,
    )
    sides = [given.only] if given.only else list(SIDES)
    trainings = [Training(name, side, way) for name in given.tasks for side in sides]
    if problems := list(problems_of(trainings)):
        sys.exit("\n".join(problems))
    stop = Stop()
    for training in trainings:
        rows = read_rows(given.json)
        if rows.get(training.name, {}).get(training.side, {}).get("key") == training.key:
            print(f"{training.name} {training.side}: is already in {given.json}")
            continue
        print(f"{training.name} {training.side}: {training.directory}", flush=True)
        train(training, stop)
        write_rows(given.json, in_order(rows, training, row_of(training)))
        remove_checkpoints(training)
        stop.end_if_asked()
    show(read_rows(given.json))


def arguments() -> argparse.Namespace:
    """The command line."""
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
    parser.add_argument("--processes", type=int, default=2, help="replicas (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process (default 1)")
    parser.add_argument("--device", default="cpu", help="run.device (default cpu)")
    parser.add_argument("--nice", type=int, default=0, metavar="N", help="give way to other processes")
    return parser.parse_args()


def weights_id(weights: Path) -> str:
    """SHA-256 of the files of weights; of a checkpoint, of the manifest, which has those of its files."""
    newest = next(iter(candidates(weights / "checkpoints")), weights)
    manifest = newest / "manifest.json"
    files = [manifest] if manifest.exists() else sorted(weights.glob("*.safetensors"))
    if not files:
        sys.exit(f"{weights}: holds no weights; --weights is a Hugging Face directory, a run or a checkpoint")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


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


@dataclass
class Stop:
    """Hears Ctrl-C and SIGTERM from its making on, and passes them to the training in progress."""

    child: subprocess.Popen[bytes] | None = None
    asked: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._hear)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self.asked.append(number)
        if self.child is not None:
            self.child.send_signal(number)

    def hand_over(self, child: subprocess.Popen[bytes]) -> None:
        """Signals go to ``child`` from now on, and so does one that came while it was born."""
        self.child = child
        for number in self.asked:
            child.send_signal(number)

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
        "weights": training.way.weights_id,
        "files": [training.trial.settings, training.trial.train, training.trial.validation],
        "settings": list(training.learned),
        "processes": training.way.processes,
        "threads": training.way.threads,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("megatron-bert-tp", "torch")},
        },
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def in_order(rows: Rows, training: Training, row: dict[str, object]) -> Rows:
    """``rows`` with one more, in the order of the tasks; one of the other side stays, however it was made."""
    more = {**rows, training.name: {**rows.get(training.name, {}), training.side: row}}
    return {name: more[name] for name in TRIALS if name in more}


def remove_checkpoints(training: Training) -> None:
    """Remove what only an unfinished run needs: a hundred megabytes for each seed."""
    for checkpoints in training.directory.glob("seed_*/checkpoints"):
        shutil.rmtree(checkpoints)


if __name__ == "__main__":
    main()
