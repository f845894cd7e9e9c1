"""Real runs of the entry points on a small corpus of words that follow each other by a rule."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_bert_tp.data.corpus.writer import CorpusWriter
from megatron_bert_tp.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY_SIZE = 99
SETTINGS = """\
model: {{vocab_size: 101, hidden_size: 32, num_hidden_layers: 3, num_attention_heads: 4, intermediate_size: 48, \
max_position_embeddings: 32}}
data: {{corpus: "{folder}/corpus", tokenizer: "{folder}/vocab.txt", sequence_length: 32, split: [80, 20, 0]}}
objective: {{pairs: nsp}}
optimizer: {{global_batch: 8, steps: 20, learning_rate: 1e-2, warmup_steps: 4, seed: 7}}
parallel: {{microbatch: 2}}
run: {{directory: "{folder}/run", evaluate_every: 10, evaluation_samples: 16, save_every: 10, device: cpu}}
"""


def make_data(folder: Path, *, num_documents: int = 20, sentences: tuple[int, int] = (4, 9)) -> Path:
    """Vocabulary, corpus and settings in ``folder``; returns the settings file."""
    words = [f"w{n}" for n in range(VOCABULARY_SIZE - len(SPECIAL))]
    (folder / "vocab.txt").write_text("".join(f"{entry}\n" for entry in SPECIAL + words), encoding="utf-8")
    tokenizer = Tokenizer.load(folder / "vocab.txt", lowercase=True)
    draws = np.random.default_rng(0)
    with CorpusWriter(folder / "corpus", tokenizer) as writer:
        for _ in range(num_documents):
            lengths = draws.integers(3, 9, size=draws.integers(*sentences)).tolist()
            start = int(draws.integers(0, 90))
            tokens = np.array([5 + (start + 3 * place) % (VOCABULARY_SIZE - 5) for place in range(sum(lengths))])
            writer.add_document(tokens, lengths)
    settings = folder / "config.yaml"
    settings.write_text(SETTINGS.format(folder=folder), encoding="utf-8")
    return settings


def start(module: str, *arguments: object, processes: int = 0) -> subprocess.CompletedProcess[str]:
    """Run an entry point, with torchrun on so many processes or alone."""
    launcher = ["torch.distributed.run", f"--nproc_per_node={processes}", "-m"] if processes else []
    command = [sys.executable, "-m", *launcher, module, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


def pretrain(settings: Path, *overrides: object, processes: int = 0) -> subprocess.CompletedProcess[str]:
    return start("megatron_bert_tp.pretrain", settings, *overrides, processes=processes)


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    """Its output; the test fails with everything that it said otherwise."""
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records(folder: Path, kind: str) -> list[dict[str, float]]:
    from megatron_bert_tp.training.progress import read_records

    return [record for record in read_records(folder / "metrics.jsonl") if record["kind"] == kind]


def without_times(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    times = {"seconds", "data_seconds", "seconds_left", "tokens_per_second"}
    return [{key: value for key, value in row.items() if key not in times} for row in rows]
