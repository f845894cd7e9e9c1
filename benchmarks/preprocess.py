"""`preprocess` against `sentencex` and `tokenizers` run bare, on the same text with the same cores.

    python benchmarks/preprocess.py FILE.xz --tokenizer VOCAB [--cased] [--rounds 3] [--documents N] [--json FILE]

The sides take turns, round by round, each in a process of its own, and the medians are compared:

- ``encode_batch``: the library's `encode_batch` with all cores, on sentences that are in memory;
- ``tokenise``: this package's encoding and writing of the same sentences, with as many workers as cores;
- ``bare``: reading, splitting and `encode_batch`, without writing;
- ``command``: the whole of `preprocess`.

Then the memory of the command (all its processes together) on the text once and four times.
"""

import argparse
import json
import lzma
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import tokenizers

from megatron_bert_tp.data.preprocessing.documents import TextLayout
from megatron_bert_tp.data.preprocessing.preprocess import preprocess
from megatron_bert_tp.data.preprocessing.sentences import split_sentences
from megatron_bert_tp.data.tokenizer import Tokenizer

CORES = len(os.sched_getaffinity(0))
SIDES = ("encode_batch", "tokenise", "bare", "command")
BATCH = 4000  # sentences, as a caller of the library would take


def main() -> None:
    """Run the rounds, or with ``--side`` be one side of one round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="JSON lines, xz")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--cased", action="store_true")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default 3)")
    parser.add_argument("--documents", type=int, default=None, help="only the first so many")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(seconds_of(given.side, given.input, given.tokenizer, lowercase=not given.cased)))
        return
    result = measure(given)
    print(json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(given: argparse.Namespace) -> dict[str, object]:
    """All rounds on copies of the input, with the medians, the ratios and the memory."""
    with tempfile.TemporaryDirectory() as folder:
        once, four_times = Path(folder) / "once.jsonl.xz", Path(folder) / "four.jsonl.xz"
        with lzma.open(given.input) as file:
            content = b"".join(islice(file, given.documents))
        once.write_bytes(lzma.compress(content, preset=1))
        four_times.write_bytes(once.read_bytes() * 4)
        num_bytes = sum(len(text.encode()) for text in texts_of(once))
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(given.rounds):
            for side in SIDES:
                seconds[side].append(float(json.loads(run(given, ["--side", side], once)[0])))
        memory = {name: run_command(given, path, folder) for name, path in {"1x": once, "4x": four_times}.items()}
    median = {side: statistics.median(taken) for side, taken in seconds.items()}
    return {
        "text_megabytes": round(num_bytes / 1e6, 2),
        "cores": CORES,
        "processor": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("tokenizers", "sentencex", "numpy", "zstandard")}
        | {"python": platform.python_version()},
        "seconds": {side: [round(each, 3) for each in taken] for side, taken in seconds.items()},
        "megabytes_per_second": {side: round(num_bytes / 1e6 / taken, 2) for side, taken in median.items()},
        "tokenise_to_encode_batch": round(median["encode_batch"] / median["tokenise"], 3),
        "command_to_bare": round(median["bare"] / median["command"], 3),
        "peak_memory_megabytes": memory,
    }


def run(given: argparse.Namespace, more: list[str], path: Path) -> list[str]:
    """Lines that a side of this file printed."""
    command = [sys.executable, __file__, str(path), "--tokenizer", str(given.tokenizer), *more]
    command += ["--cased"] if given.cased else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()


def run_command(given: argparse.Namespace, path: Path, folder: str) -> int:
    """Most memory of all processes of the command together, in MB (proportional set sizes)."""
    output = ["--output", f"{folder}/memory", "--overwrite", "--tokenizer", str(given.tokenizer)]
    command = [sys.executable, "-m", "megatron_bert_tp.preprocess", str(path), *output]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        most = max(most, sum(map(memory_of, family_of(process.pid))))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"preprocess failed with {process.returncode}")
    return most // 1000


def family_of(pid: int) -> list[int]:
    """A process and all that come from it."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in map(str.split, listed.splitlines())}
    family = [pid]
    for member in family:  # grows on the way
        family += [child for child, parent in parents.items() if parent == member]
    return family


def memory_of(pid: int) -> int:
    """Proportional set size of a process in kB; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def texts_of(path: Path) -> list[str]:
    """Text of each record."""
    with lzma.open(path) as file:
        return [json.loads(line)["text"] for line in file]


def seconds_of(side: str, path: Path, vocabulary: Path, *, lowercase: bool) -> float:
    """Time of one side."""
    library = Tokenizer.load(vocabulary, lowercase).library
    if side in ("bare", "command"):
        started = time.monotonic()
        if side == "bare":
            encode(library, sentences_of(path))
        else:
            tokenise(path, vocabulary, lowercase=lowercase, layout=TextLayout())
        return time.monotonic() - started
    sentences = sentences_of(path)
    if side == "encode_batch":
        started = time.monotonic()
        encode(library, sentences)
        return time.monotonic() - started
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "sentences.txt"
        lines.write_text("\n".join(sentences), encoding="utf-8")
        started = time.monotonic()
        layout = TextLayout(sentence_per_line=True)
        tokenise(lines, vocabulary, lowercase=lowercase, layout=layout)
        return time.monotonic() - started


def sentences_of(path: Path) -> list[str]:
    """Sentences of all documents."""
    split = (split_sentences(text, sentence_per_line=False) for text in texts_of(path))
    return [sentence for document in split for sentence in document]


def encode(library: tokenizers.Tokenizer, sentences: list[str]) -> None:
    """The library's own way, its threads on all cores, ids not even looked at."""
    for first in range(0, len(sentences), BATCH):
        library.encode_batch(sentences[first : first + BATCH], add_special_tokens=False)


def tokenise(path: Path, vocabulary: Path, *, lowercase: bool, layout: TextLayout) -> None:
    """This package's way, with as many workers as cores."""
    with tempfile.TemporaryDirectory() as folder:
        preprocess(
            [path], vocabulary, Path(folder) / "corpus", layout=layout, lowercase=lowercase, workers=CORES
        )


if __name__ == "__main__":
    main()
