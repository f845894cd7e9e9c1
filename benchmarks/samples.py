"""Building pretraining samples on one core: sample numbers in, tensors of microbatches out.

    python benchmarks/samples.py [--corpus PREFIX --tokenizer FILE] [--seconds 2] [--json FILE]

Timed is `PretrainingBatches.take`, which draws pairs, gathers tokens, chooses and hides words, and makes tensors,
in this one process and on one core.  Printed are samples per second of time and of processor time, which a busy
machine does not lengthen: medians over the steps of ``--seconds`` seconds.  Without ``--corpus``, the text is made
up: 2 million tokens in 2,000 documents, a sixth of them pieces of words.  Batches are cut to microbatches of 32.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from megatron_bert_tp.config.schema import MaskingConfig
from megatron_bert_tp.data.batches import PretrainingBatches
from megatron_bert_tp.data.corpus.mapped import Corpus
from megatron_bert_tp.data.corpus.writer import CorpusWriter
from megatron_bert_tp.data.packing import Cutting
from megatron_bert_tp.data.samples.source import SampleSource, SourceSettings
from megatron_bert_tp.data.samples.spans import build_spans
from megatron_bert_tp.data.tokenizer import SPECIAL_TOKENS, Tokenizer, Vocabulary

SEED, MICROBATCH = 1234, 32
LENGTHS, BATCHES = (128, 512), (32, 256, 1024)
MASKINGS = {
    "words": MaskingConfig(),
    "1 to 3 words": MaskingConfig(longest_span=3),
    "geometric to 10": MaskingConfig(longest_span=10, span_lengths="geometric"),
}
VOCABULARY_SIZE, NUM_DOCUMENTS = 30522, 2000


def main() -> None:
    """Measure every length, masking and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="prefix of a corpus (default: made-up text)")
    parser.add_argument("--tokenizer", type=Path, help="vocab.txt or tokenizer.json of the corpus")
    parser.add_argument("--seconds", type=float, default=2.0, help="time of each measurement (default 2)")
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    if (given.corpus is None) != (given.tokenizer is None):
        parser.error("--corpus and --tokenizer go together")
    stay_on_one_core()
    with tempfile.TemporaryDirectory() as folder:
        prefix, tokenizer = (given.corpus, given.tokenizer) if given.corpus else make_corpus(Path(folder))
        corpus, vocabulary = Corpus.open(prefix), Tokenizer.load(tokenizer, lowercase=True).vocabulary
        rows = [
            measure(corpus, vocabulary, length=length, masking=name, batch=batch, seconds=given.seconds)
            for length in LENGTHS
            for name in MASKINGS
            for batch in BATCHES
        ]
    if given.json:
        text = given.corpus.name if given.corpus else "made up"
        given.json.write_text(json.dumps(summary(rows, corpus, text), indent=2) + "\n", encoding="utf-8")


def stay_on_one_core() -> None:
    """The process on the last core that it may use, where the system can be asked for that."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def make_corpus(folder: Path) -> tuple[Path, Path]:
    """Prefix and vocabulary of made-up text: sentences of about 24 tokens, frequent words and rare ones."""
    pieces = [f"##{n}" for n in range(VOCABULARY_SIZE // 6)]
    words = [f"w{n}" for n in range(VOCABULARY_SIZE - len(pieces) - len(SPECIAL_TOKENS))]
    vocabulary, first_piece = folder / "vocab.txt", len(SPECIAL_TOKENS) + len(words)
    vocabulary.write_text("\n".join([*SPECIAL_TOKENS, *words, *pieces]) + "\n", encoding="utf-8")
    draws = np.random.default_rng(0)
    with CorpusWriter(folder / "corpus", Tokenizer.load(vocabulary, lowercase=True)) as writer:
        for num_sentences in draws.integers(10, 80, NUM_DOCUMENTS):
            lengths = np.clip(draws.lognormal(3.0, 0.6, num_sentences).astype(int), 1, 200)
            rank = draws.zipf(1.2, int(lengths.sum()))
            is_piece = draws.random(len(rank)) < 1 / 6
            ids = np.where(is_piece, first_piece + rank % len(pieces), len(SPECIAL_TOKENS) + rank % len(words))
            writer.add_document(ids, lengths.tolist())
    return folder / "corpus", vocabulary


def measure(
    corpus: Corpus, vocabulary: Vocabulary, *, length: int, masking: str, batch: int, seconds: float
) -> dict[str, object]:
    """One row of the result: the median over steps, without the first."""
    settings = SourceSettings(
        split=(1.0, 0.0, 0.0), sequence_length=length, short_share=0.1, pairs="nsp", seed=SEED
    )
    documents = np.arange(corpus.num_documents)
    spans = build_spans(corpus, documents, sequence_length=length, short_share=settings.short_share, seed=SEED)
    source = SampleSource([corpus], [spans], "training", settings)
    batches = PretrainingBatches(
        source,
        vocabulary,
        sequence_length=length,
        masking=MASKINGS[masking],
        seed=SEED,
        size_of=lambda _done: batch,
        cutting=Cutting(packing="none", size=MICROBATCH),
    )
    batches.take(0)
    times: list[tuple[float, float]] = []
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(times) < 3:
        before = time.perf_counter(), time.process_time()
        batches.take(batch * (len(times) + 1))
        times.append((time.perf_counter() - before[0], time.process_time() - before[1]))
    speed, speed_of_core = (batch / statistics.median(column) for column in zip(*times, strict=True))
    print(
        f"length {length:3}  {masking:<15}  batch {batch:4}  {speed:9,.0f} samples/s  "
        f"{speed_of_core:9,.0f} a second of the core",
        flush=True,
    )
    return {
        "length": length,
        "masking": masking,
        "batch": batch,
        "steps": len(times),
        "samples_per_second": speed,
        "samples_per_core_second": speed_of_core,
    }


def summary(rows: list[dict[str, object]], corpus: Corpus, text: str) -> dict[str, object]:
    """The rows, and what they were measured on."""
    return {
        "rows": rows,
        "text": {"name": text, "documents": corpus.num_documents, "tokens": corpus.num_tokens},
        "microbatch": MICROBATCH,
        "machine": {"processor": platform.processor() or platform.machine(), "cores": 1},
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__},
    }


if __name__ == "__main__":
    main()
