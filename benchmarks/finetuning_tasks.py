"""Tasks of `finetuning.py`, and the command that trains one of them on one side."""

import hashlib
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from finetuning_report import SIDES

from megatron_bert_tp.checkpoint.directories import candidates
from megatron_bert_tp.formats.task_folder import model_folder
from megatron_bert_tp.formats.weights import open_encoder_weights

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "finetune"
SAME = (
    "optimizer.global_batch=32",
    "optimizer.warmup_share=0.1",
    "parallel.packing=packed",
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
    precision: str = "bfloat16"
    more: tuple[str, ...] = ()


TRIALS = {
    "sst-2": Trial("sst-2.yaml", "glue/SST-2/train.tsv", "glue/SST-2/dev.tsv", 64),
    "trec": Trial("trec.yaml", "trec_qc/train.txt", "trec_qc/test.txt", 32),
    "mrpc": Trial("mrpc.yaml", "glue/MRPC/train.tsv", "glue/MRPC/dev.tsv", 128),
    # A number of 8 bits makes many pairs equal that are not.
    "sts-b": Trial("sts-b.yaml", "glue/STS-B/train.tsv", "glue/STS-B/dev.tsv", 96, precision="float32"),
    "wnut-17": Trial("ner.yaml", "wnut17/wnut17train.conll", "wnut17/emerging.dev.conll", 128),
    "squad": Trial(
        "squad.yaml",
        "squad/train-v1.1.first4370.json",
        "squad/xquad.en.json",
        192,
        more=("task.overlap=64",),
    ),
    "race": Trial("race.yaml", "race_layout/train", "race_layout/dev", 192),
}


@dataclass(frozen=True)
class Start:
    """What the trainings begin with, and what tells its content: of a path only the name is known."""

    path: Path
    weights: str
    """SHA-256 of the weights."""
    sizes: str
    """SHA-256 of the sizes and the tokenizer: all that random weights take from there."""

    @classmethod
    def at(cls, path: Path) -> "Start":
        """Read from a Hugging Face directory, a run or a checkpoint; an error of the package where it is none."""
        given, path = path, model_folder(path)
        source = open_encoder_weights(path, verify=False)
        newest = next(iter(candidates(path / "checkpoints")), path)
        manifest = newest / "manifest.json"  # has the SHA-256 of the other files of a checkpoint
        files = sorted(file for pattern in ("*.safetensors", "*.bin") for file in path.glob(pattern))
        weights = [manifest] if manifest.exists() else files
        tokenizer = [file.read_bytes() for _, file in sorted(source.tokenizer_files.items())]
        sizes = repr((asdict(source.shape), source.lowercase is not False)).encode()
        return cls(given.resolve(), _sha256(file.read_bytes() for file in weights), _sha256([sizes, *tokenizer]))


def _sha256(contents: Iterable[bytes]) -> str:
    """Of the SHA-256 of each, so that no two lists have the same."""
    return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()


@dataclass(frozen=True)
class Way:
    """What all trainings of a call share."""

    start: Start
    data: Path
    out: Path
    examples: int
    epochs: float
    seeds: tuple[int, ...]
    learning_rate: str
    dropout: str
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
    def files(self) -> list[str]:
        """Settings file and data, without the folders where they lie."""
        return [self.trial.settings, self.trial.train, self.trial.validation]

    @property
    def start_id(self) -> str:
        """What tells its beginning from others."""
        return self.way.start.weights if self.side == "pretrained" else self.way.start.sizes

    @property
    def learned(self) -> list[str]:
        """Overrides that decide what comes out."""
        return [
            "data.test=null",
            f"model.hidden_dropout_prob={self.way.dropout}",
            f"model.attention_probs_dropout_prob={self.way.dropout}",
            *SAME,
            f"model.random_weights={SIDES[self.side]}",
            f"data.sequence_length={self.trial.sequence_length}",
            f"data.most_train={self.way.examples}",
            f"optimizer.learning_rate={self.way.learning_rate}",
            f"optimizer.precision={self.trial.precision}",
            f"optimizer.epochs={self.way.epochs:g}",
            f"run.seeds=[{', '.join(map(str, self.way.seeds))}]",
            *self.trial.more,
        ]

    @property
    def key(self) -> str:
        """What tells its result from those of other settings, files and beginnings."""
        settings = (CONFIGS / self.trial.settings).read_bytes()
        return _sha256([settings, *(part.encode() for part in (*self.learned, *self.files, self.start_id))])[:12]

    @property
    def directory(self) -> Path:
        """Its own folder in RUNS."""
        return self.way.out / self.name / f"{self.side}-{self.key}"

    @property
    def overrides(self) -> list[str]:
        """All settings that differ from the file."""
        return [
            *self.learned,
            f"model.weights={self.way.start.path}",
            f"data.train={self.way.data / self.trial.train}",
            f"data.validation={self.way.data / self.trial.validation}",
            f"run.directory={self.directory}",
            "run.keep_last=1",
            f"run.device={self.way.device}",
        ]

    @property
    def command(self) -> list[str]:
        """What trains it; torchrun by its module, so that it is this environment's."""
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={self.way.processes}", "-m"]
        launcher = torchrun if self.way.processes > 1 else []
        file = str(CONFIGS / self.trial.settings)
        return [sys.executable, "-m", *launcher, "megatron_bert_tp.finetune", file, *self.overrides]
