"""One task of each kind on the first part of its real files, and the small model that learns it."""

import csv
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bert_tp.config.task_table import TASKS, Kind
from tests.sources import real_data

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FIRST_CHARACTER, NUM_ENTRIES = 999, 5000  # of BERT's vocabulary: characters, and then words, common ones first
TOPICS = ("film", "time", "funny")
MOST_WORDS = 14  # of a sentence
OVERLAP = 24  # tokens that two windows of a context share
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    # Far above what training starts with, so that answers differ clearly from the first step on.
    "initializer_range": 0.3,
}
SETTINGS = """\
model: {{weights: "{weights}"}}
task: {{name: {task}{more}}}
data: {{train: "{train}", validation: "{validation}", sequence_length: {length}}}
optimizer: {{global_batch: 8, steps: 30, learning_rate: 1e-3, precision: float64, seed: 7}}
parallel: {{microbatch: 2}}
run: {{directory: "{folder}/run", evaluate_every: 5, save_every: 30, device: cpu, save_in_background: false}}
"""


@dataclass(frozen=True)
class Files:
    """The files of a task and the settings that name them."""

    settings: Path
    weights: Path
    train: Path
    validation: Path
    length: int
    """`data.sequence_length`."""


def write_vocabulary(folder: Path) -> Path:
    """Characters and the most common words of BERT's own vocabulary."""
    entries = real_data("vocab/bert-large-uncased-vocab.txt").read_text(encoding="utf-8").splitlines()
    path = folder / "vocab.txt"
    kept = [*SPECIAL, *entries[FIRST_CHARACTER:NUM_ENTRIES]]
    path.write_text("".join(f"{entry}\n" for entry in kept), encoding="utf-8")
    return path


def write_model(folder: Path, *, num_layers: int = 2) -> Path:
    """A random model with a head for pretraining as `transformers` itself writes it, and its vocabulary."""
    import torch
    from transformers import MegatronBertConfig, MegatronBertForPreTraining

    vocabulary = write_vocabulary(folder)
    size = len(vocabulary.read_text(encoding="utf-8").splitlines())
    torch.manual_seed(3)
    config = MegatronBertConfig(vocab_size=size, **{**SIZES, "num_hidden_layers": num_layers})
    model = MegatronBertForPreTraining(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # biases of zero would hide that one was left out
                parameter.normal_(1.0 if name.endswith(("ln.weight", "LayerNorm.weight")) else 0.0, 0.1)
    model.save_pretrained(folder)
    return folder


def write_task(kind: Kind, folder: Path, weights: Path) -> Files:
    """Files and settings of the task of this kind."""
    case = CASES[kind]
    train, validation = case.write(folder)
    settings = folder / "task.yaml"
    text = SETTINGS.format(
        weights=weights,
        task=case.task,
        more=case.more,
        train=train,
        validation=validation,
        length=case.length,
        folder=folder,
    )
    settings.write_text(text, encoding="utf-8")
    assert TASKS[case.task].kind is kind
    return Files(settings, weights, train, validation, case.length)


def first_lines(source: Path, target: Path, count: int) -> Path:
    """The first ``count`` lines of a file, byte for byte."""
    with source.open("rb") as file:
        target.write_bytes(b"".join(itertools.islice(file, count)))
    return target


def _pairs(folder: Path) -> tuple[Path, Path]:
    parts = real_data("glue/MRPC")
    return first_lines(parts / "train.tsv", folder / "train.tsv", 49), first_lines(
        parts / "dev.tsv", folder / "dev.tsv", 14
    )


def _topics(folder: Path) -> tuple[Path, Path]:
    """Sentences of SST-2 with those of `TOPICS` that they speak of; many speak of none."""
    found = []
    for name, first, count in (("train", 0, 48), ("dev", 48, 13)):
        with (real_data("glue/SST-2") / "train.tsv").open(encoding="utf-8") as file:
            next(file)
            texts = [line.rsplit("\t", 1)[0].strip() for line in file]
        speaking = [text for text in texts if any(topic in text for topic in TOPICS)]
        mixed = [text for pair in zip(speaking, texts, strict=False) for text in pair]
        path = folder / f"{name}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            for text in mixed[first : first + count]:
                rows.writerow([text, ",".join(topic for topic in TOPICS if topic in text)])
        found.append(path)
    return found[0], found[1]


def _numbers(folder: Path) -> tuple[Path, Path]:
    parts = real_data("glue/STS-B")
    return first_lines(parts / "train.tsv", folder / "train.tsv", 49), first_lines(
        parts / "dev.tsv", folder / "dev.tsv", 14
    )


def _choices(folder: Path) -> tuple[Path, Path]:
    found = []
    # Two options of a question in dev/2 differ in words outside of the vocabulary alone: nothing tells them apart.
    for name, numbers in (("train", range(20)), ("dev", (0, 1, 3, 4, 5, 6))):
        target = folder / name / "middle"
        target.mkdir(parents=True)
        for number in numbers:
            shutil.copy(real_data(f"race_layout/{name}/middle/{number}.txt"), target)
        found.append(folder / name)
    return found[0], found[1]


def _answers(folder: Path) -> tuple[Path, Path]:
    """The first questions of the first paragraphs."""
    found = []
    for name, file, paragraphs in (("train", "train-v1.1.first4370.json", 4), ("dev", "xquad.en.json", 1)):
        content = json.loads(real_data(f"squad/{file}").read_text(encoding="utf-8"))
        content["data"] = content["data"][:1]
        content["data"][0]["paragraphs"] = content["data"][0]["paragraphs"][:paragraphs]
        path = folder / f"{name}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        found.append(path)
    return found[0], found[1]


def _tags(folder: Path) -> tuple[Path, Path]:
    parts = real_data("wnut17")
    found = []
    for name, file, count in (("train", "wnut17train.conll", 48), ("dev", "emerging.dev.conll", 13)):
        sentences = itertools.islice(_sentences(parts / file), count)
        path = folder / f"{name}.conll"
        path.write_text("".join(f"{sentence}\n\n" for sentence in sentences), encoding="utf-8")
        found.append(path)
    return found[0], found[1]


def _sentences(path: Path) -> Iterator[str]:
    """Short sentences with entities of the two most common types alone: most have none."""
    for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
        types = set(re.findall(r"\tB-(\S+)", block))
        if types and types <= {"person", "location"} and block.count("\n") < MOST_WORDS:
            yield block.strip("\n")


@dataclass(frozen=True)
class Case:
    """Name of a task, its longest sample, and what writes its files for training and validation."""

    task: str
    length: int
    write: Callable[[Path], tuple[Path, Path]]
    more: str = ""
    """Further settings of the task."""


CASES: Mapping[Kind, Case] = {
    Kind.CLASS: Case("mrpc", 64, _pairs),
    Kind.CLASSES: Case("multi-label", 32, _topics),
    Kind.NUMBER: Case("sts-b", 48, _numbers),
    Kind.CHOICE: Case("race", 64, _choices),
    Kind.ANSWER: Case("squad", 96, _answers, f", overlap: {OVERLAP}"),
    Kind.TAGS: Case("token-classification", 64, _tags),
}
