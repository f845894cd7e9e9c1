"""What packing saves: the share of padding that is computed, and tokens per second, on real text.

    python benchmarks/packing.py NAME=TEXT... --vocabulary FILE [--rounds 5] [--lengths 128 512] [--json FILE]

TEXT is a text file, or a folder of them; a line like ``CHAPTER IV`` or `` = Title = `` begins a document, and
where NAME ends in ``-paragraphs``, every paragraph of 200 characters or more is one.  For each text and sequence
length, one trainer for each way of packing takes the same steps, in turn within each round (hidden 256, 8 layers,
one process, two threads, dropout 0.1).  The padding is that of the samples of an epoch, or of 50 steps of it; the
speed counts real tokens alone, and ratios are taken round by round.  Last comes the share of the time of all steps
that was spent waiting for data.
"""

import argparse
import json
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_bert_tp.config.load import load_config
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.data.preprocessing.preprocess import preprocess
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.parallel.mesh import Axis, ParallelMesh
from megatron_bert_tp.training.build import build_pretrainer
from megatron_bert_tp.training.processes import keep_freed_memory
from megatron_bert_tp.training.texts import Texts, open_texts
from megatron_bert_tp.training.trainer import Trainer

WAYS = ("none", "bins", "packed")
THREADS, WARMUP, PADDING_STEPS = 2, 1, 50
_HEAD = re.compile(r"\s*((CHAPTER|BOOK|PART|PHASE)\b.{0,60}|= [^=].* =)\s*")
SETTINGS = """\
model: {{vocab_size: 30592, hidden_size: 256, num_hidden_layers: 8, num_attention_heads: 8, \
intermediate_size: 1024, max_position_embeddings: {length}}}
data: {{corpus: "{folder}/{name}", tokenizer: "{vocabulary}", sequence_length: {length}, split: [100, 0, 0]}}
objective: {{pairs: nsp}}
optimizer: {{global_batch: {batch}, steps: 100000, learning_rate: 1e-4}}
parallel: {{microbatch: {microbatch}, microbatch_tokens: {tokens}}}
run: {{directory: "{folder}/run", evaluation_samples: 0}}
"""


def main() -> None:
    """Measure every text at every length and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="NAME=TEXT")
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each way (default 5)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    keep_freed_memory()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for text in given.texts:
            name, _, path = text.partition("=")
            make_corpus(Path(path), given.vocabulary, Path(folder) / name)
            for length in given.lengths:
                rows.append({"text": name, "length": length, **measure(Path(folder), name, length, given)})
                print(json.dumps(rows[-1]), flush=True)
    show(rows)
    if given.json:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        given.json.write_text(json.dumps({"rows": rows, "versions": versions}, indent=2) + "\n", encoding="utf-8")


def make_corpus(path: Path, vocabulary: Path, prefix: Path) -> None:
    """The text as a corpus with a document a chapter or article."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    lines = prefix.with_suffix(".jsonl")
    with lines.open("w", encoding="utf-8") as out:
        cut = paragraphs if prefix.name.endswith("-paragraphs") else documents
        for document in (document for file in files for document in cut(file)):
            out.write(json.dumps({"text": document}) + "\n")
    preprocess([lines], vocabulary, prefix, workers=2)


def paragraphs(file: Path) -> Iterator[str]:
    """What stands between blank lines, without headings."""
    for text in re.split(r"\n\s*\n", file.read_text(encoding="utf-8-sig")):
        if len(text) >= 200:
            yield text


def documents(file: Path) -> Iterator[str]:
    """Chapters of a novel, or articles of wikitext; what is under 200 characters is a table of contents."""
    held: list[str] = []
    for line in [*file.read_text(encoding="utf-8-sig").splitlines(), "CHAPTER"]:
        if not _HEAD.fullmatch(line):
            held.append(line)
            continue
        if len(text := "\n".join(held)) >= 200:
            yield text
        held = []


def measure(folder: Path, name: str, length: int, given: argparse.Namespace) -> dict[str, object]:
    """Padding and speed of each way over the same samples."""
    batch, microbatch = (64, 16) if length <= 128 else (16, 4)
    file = folder / "config.yaml"
    values = {"folder": folder, "name": name, "vocabulary": given.vocabulary.resolve(), "length": length}
    sizes = {"batch": batch, "microbatch": microbatch, "tokens": microbatch * length}
    file.write_text(SETTINGS.format(**values, **sizes), encoding="utf-8")
    configs = {way: load_config(file, [f"parallel.packing={way}"]) for way in WAYS}
    texts = {way: open_texts(config, Axis.alone("data"), say=print) for way, config in configs.items()}
    speeds, waiting = alternate(configs, texts, given.rounds)
    samples = texts["none"].training.num_samples_per_epoch
    return {
        "samples_per_epoch": samples,
        "padding": {way: padding(texts[way], batch, samples) for way in WAYS},
        "tokens_per_second": {way: statistics.median(values) for way, values in speeds.items()},
        "ratio": {
            way: statistics.median(a / b for a, b in zip(speeds[way], speeds["none"], strict=True)) for way in WAYS
        },
        "waiting_share": waiting,
    }


def padding(texts: Texts, batch: int, samples: int) -> float:
    """Share of the positions of an epoch, or of the first steps of it, that hold no token."""
    tokens = positions = 0
    for step in range(min(PADDING_STEPS, max(1, samples // batch))):
        for microbatch in texts.training.take(step * batch):
            tokens += microbatch.num_tokens
            positions += microbatch.input_ids.numel()
    return 1 - tokens / positions


def alternate(
    configs: dict[str, Config], texts: dict[str, Texts], rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Tokens per second of each way, round by round; and the share of all time that was spent waiting for data."""
    trainers: dict[str, Trainer] = {
        way: build_pretrainer(
            config, ParallelMesh.alone(), texts[way], agreement=Agreement.alone(), device=torch.device("cpu")
        )
        for way, config in configs.items()
    }
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    waited = dict.fromkeys(WAYS, 0.0)
    timed = dict.fromkeys(WAYS, 0.0)
    for number in range(WARMUP + rounds):
        for way in WAYS if number % 2 else reversed(WAYS):
            started = time.perf_counter()
            report = trainers[way].train_step()
            seconds = time.perf_counter() - started
            if number >= WARMUP:
                speeds[way].append(report.work.tokens / seconds)
                waited[way] += report.data_seconds
                timed[way] += seconds
    return speeds, {way: waited[way] / timed[way] for way in WAYS}


def show(rows: list[dict[str, object]]) -> None:
    """A line for each text and length."""
    table = Table("text", "length", "padding none", "bins", "packed", "tokens/s none", "bins", "packed")
    for row in rows:
        paddings, speeds, ratios = row["padding"], row["tokens_per_second"], row["ratio"]
        assert isinstance(paddings, dict)
        assert isinstance(speeds, dict)
        assert isinstance(ratios, dict)
        table.add_row(
            str(row["text"]),
            str(row["length"]),
            *(f"{100 * paddings[way]:.1f}%" for way in WAYS),
            *(f"{speeds[way]:,.0f} ({ratios[way]:.2f}x)" for way in WAYS),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
