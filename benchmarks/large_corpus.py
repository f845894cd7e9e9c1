"""A corpus of ten billion tokens: how long it takes to open, and how much memory.

    python benchmarks/large_corpus.py [--sentences 400_000_000] [--folder DIR] [--cold] [--json FILE]

The index is real, drawn and written block by block (4.8 GB for 400 million sentences); the .bin is a sparse file
of the right size, so that no disk is filled with tokens.  Each measurement runs in a process of its own, which
reports its seconds, the largest anonymous memory that was seen (what the process really occupies) and its largest
resident set (which counts the pages of mapped files too, although the kernel takes them back when it needs them).
``--cold`` asks the kernel to forget the index before each measurement.  The files are removed at the end.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.data.corpus.index import HEADER, MAGIC, VERSION
from megatron_bert_tp.data.corpus.mapped import Corpus
from megatron_bert_tp.data.samples.source import SampleSource, SourceSettings
from megatron_bert_tp.data.tokenizer import Vocabulary
from megatron_bert_tp.errors import DataError

NO_WORDS = Vocabulary(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), 0, 1, 2, 3, 4)
TYPE_CODE, ITEM_SIZE = 8, 2  # uint16
SENTENCES_OF_DOCUMENT = 20
_BLOCK = 1 << 22  # sentences
_SAMPLING_SECONDS = 0.005

Numbers = dict[str, float]
Measurement = Callable[[Path], Numbers]
"""Prefix of the corpus to what was found beside seconds and memory."""


def make_corpus(prefix: Path, num_sentences: int, *, sentences_of_document: int = SENTENCES_OF_DOCUMENT) -> int:
    """Write PREFIX.idx and a sparse PREFIX.bin; sentences have 5 to 45 tokens.  Returns the number of tokens."""
    boundaries = -(-num_sentences // sentences_of_document) + 1
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, TYPE_CODE, num_sentences, boundaries))
        for lengths in _lengths(num_sentences):
            file.write(lengths.tobytes())
        end = 0
        for lengths in _lengths(num_sentences):
            ends = end + np.cumsum(lengths, dtype="<i8") * ITEM_SIZE
            file.write((ends - lengths.astype("<i8") * ITEM_SIZE).tobytes())
            end = int(ends[-1])
        for first in range(0, boundaries, _BLOCK):
            numbers = np.arange(first, min(first + _BLOCK, boundaries), dtype="<i8") * sentences_of_document
            file.write(np.minimum(numbers, num_sentences).tobytes())
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(end)
    return end // ITEM_SIZE


def open_corpus(prefix: Path) -> Numbers:
    """Open and check every number of the index."""
    corpus = Corpus.open(prefix)
    return {"tokens": corpus.num_tokens, "sentences": corpus.num_sentences, "documents": corpus.num_documents}


def digest(prefix: Path) -> Numbers:
    """Open, then the SHA-256 that the cached sample index is known by."""
    corpus = Corpus.open(prefix)
    started = time.perf_counter()
    assert len(corpus.digest) == 64
    return {"digest_seconds": time.perf_counter() - started}


def starts(prefix: Path) -> Numbers:
    """Open, then first tokens of a million boundaries here and there."""
    corpus = Corpus.open(prefix)
    chosen = np.random.default_rng(0).integers(0, corpus.num_sentences + 1, 1_000_000)
    started = time.perf_counter()
    corpus.starts_of(chosen)
    return {"starts_seconds": time.perf_counter() - started}


def first_batch(prefix: Path, *, sequence_length: int) -> Numbers:
    """Open, find or build the sample index, and lay out the first 32 samples of the training part."""
    settings = SourceSettings(
        split=(96.0, 4.0, 0.0), sequence_length=sequence_length, short_share=0.1, pairs="nsp", seed=1
    )
    corpus = Corpus.open(prefix)
    opened = time.perf_counter()
    source = SampleSource.open([corpus], part="training", settings=settings, say=lambda _line: None)
    found = time.perf_counter()
    source.rows(source.pairs(np.arange(32)), NO_WORDS, width=sequence_length)
    files = Path(f"{prefix}.samples").glob("*/*.npy")
    return {
        "samples_per_epoch": source.num_samples_per_epoch,
        "index_seconds": found - opened,
        "batch_seconds": time.perf_counter() - found,
        "index_folders_mb": sum(path.stat().st_size for path in files) / 1e6,
    }


def refuse_cut(prefix: Path) -> Numbers:
    """The refusal of a .bin that lacks its last byte."""
    path = Path(f"{prefix}.bin")
    size = path.stat().st_size
    os.truncate(path, size - 1)
    try:
        Corpus.open(prefix)
        raise AssertionError("a cut corpus was opened")
    except DataError as error:
        return {"bytes_told": float(str(size - 1) in str(error))}
    finally:
        os.truncate(path, size)


MEASUREMENTS: dict[str, Measurement] = {
    "open": open_corpus,
    "open and digest": digest,
    "open and a million starts": starts,
    "refuse a cut .bin": refuse_cut,
    "first batch of 512, built": partial(first_batch, sequence_length=512),
    "first batch of 512, cached": partial(first_batch, sequence_length=512),
    "first batch of 128, built": partial(first_batch, sequence_length=128),
    "first batch of 128, cached": partial(first_batch, sequence_length=128),
}


def main() -> None:
    """Make the corpus and measure, or with ``--measure`` be one of the measuring processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=400_000_000, help="default 400 million")
    parser.add_argument("--folder", type=Path, help="where the corpus is made (default: that of temporary files)")
    parser.add_argument("--cold", action="store_true", help="let the kernel forget the index before each opening")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--measure", choices=sorted(MEASUREMENTS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measured(MEASUREMENTS[given.measure], given.folder)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        prefix = Path(folder) / "large"
        tokens = make_corpus(prefix, given.sentences)
        size = Path(f"{prefix}.idx").stat().st_size
        print(f"{given.sentences:,} sentences, {tokens:,} tokens, index of {size / 1e9:.2f} GB", flush=True)
        results = {name: in_child(name, prefix, cold=given.cold) for name in MEASUREMENTS}
    if given.json:
        setting = {"sentences": given.sentences, "tokens": tokens, "idx_bytes": size, "cold": given.cold}
        versions = {"python": platform.python_version(), "numpy": np.__version__}
        given.json.write_text(json.dumps({**setting, "versions": versions, "results": results}, indent=2) + "\n")


def in_child(name: str, prefix: Path, *, cold: bool = False) -> Numbers:
    """One measurement in a fresh process, printed as a line."""
    if cold:
        forget(Path(f"{prefix}.idx"))
    command = [sys.executable, __file__, "--measure", name, "--folder", str(prefix)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers: Numbers = json.loads(output.splitlines()[-1])
    shown = "  ".join(f"{key} {value:,.2f}" for key, value in numbers.items())
    print(f"{name:<28} {shown}", flush=True)
    return numbers


def measured(measurement: Measurement, prefix: Path) -> Numbers:
    """Seconds and MB of a measurement in this process, beyond what Python and its modules take."""
    before = memory()
    with peaks() as highest:
        started = time.perf_counter()
        found = measurement(prefix)
        seconds = time.perf_counter() - started
    grown = {f"{name}_mb": (highest[name] - before[name]) / 1e6 for name in highest}
    return {"seconds": seconds, **grown, **found}


@contextmanager
def peaks() -> Iterator[Numbers]:
    """Context manager that fills a dictionary with the largest `memory` seen inside, and at its end."""
    highest, stop = memory(), threading.Event()

    def look() -> None:
        for name, value in memory().items():
            highest[name] = max(highest[name], value)

    def watch() -> None:
        while not stop.wait(_SAMPLING_SECONDS):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield highest
        look()
    finally:
        stop.set()
        watcher.join()


def memory() -> Numbers:
    """Bytes of this process: anonymous (its own) and all resident ones (mapped files too)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    names = {"anonymous": "RssAnon", "resident": "VmRSS"}
    return {name: 1024.0 * int(fields[field].split()[0]) for name, field in names.items()}


def forget(path: Path) -> None:
    """Ask the kernel to drop the pages of a file from its cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _lengths(num_sentences: int) -> Iterator[npt.NDArray[np.int32]]:
    for first in range(0, num_sentences, _BLOCK):
        draws = np.random.default_rng([0, first])
        yield draws.integers(5, 46, size=min(_BLOCK, num_sentences - first), dtype=np.int32).astype("<i4")


if __name__ == "__main__":
    main()
