"""What dropout costs on a GPU at the sizes of the 345M model: torch's own, bits from the CPU, our kernels.

    python benchmarks/gpu.py [--rounds 30] [--steps 8] [--json benchmarks/results/gpu.json]

Each case is forward and backward in bfloat16, timed by events of the GPU; contenders take turns within a round.
Last come training steps of the whole model, with dropout 0.1 and without, in processes of their own, by the
``tokens_per_second`` of their metrics.  Needs a CUDA device and triton.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bert_tp.data.preprocessing.documents import TextLayout
from megatron_bert_tp.data.preprocessing.preprocess import preprocess
from megatron_bert_tp.data.preprocessing.vocabulary_training import train_tokenizer
from megatron_bert_tp.demo.corpus import build_corpus
from megatron_bert_tp.demo.sources import installed_sources
from megatron_bert_tp.model import dot_product
from megatron_bert_tp.parallel import random_bits, triton_attention, triton_dropout
from megatron_bert_tp.parallel.kernels import load_kernels
from megatron_bert_tp.parallel.random_bits import Place, RandomBits

SAMPLES, POSITIONS, HIDDEN, HEADS, HEAD = 4, 512, 1024, 16, 64  # of a microbatch of the 345M model
PROBABILITY, LAYER, WARMUP = 0.1, 1, 5
PLACE = Place.MLP_OUTPUT
BITS = RandomBits(1, tuple(range(SAMPLES)))
Contender = Callable[[], Tensor]
SETTINGS = """\
model: {{vocab_size: 30592, hidden_size: 1024, num_hidden_layers: 24, num_attention_heads: 16, \
intermediate_size: 4096, max_position_embeddings: 512, hidden_dropout_prob: {probability}, \
attention_probs_dropout_prob: {probability}}}
data: {{corpus: "{folder}/corpus", tokenizer: "{folder}/vocab.txt", sequence_length: 512}}
optimizer: {{global_batch: 32, steps: {steps}, learning_rate: 1e-4, precision: {precision}}}
parallel: {{microbatch: 4}}
run: {{directory: "{folder}/run_{probability}", evaluation_samples: 0, save_every: 1000, device: cuda}}
"""


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="timed passes of each contender (default 30)")
    parser.add_argument("--steps", type=int, default=8, help="timed training steps (default 8); 0: none")
    parser.add_argument("--precision", default="bfloat16", help="optimizer.precision (default bfloat16)")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py measures a CUDA device, and torch sees none here; nothing was written")
    triton_version = load_kernels("bits").triton.__version__
    cases = {"dropout": dropout(), "attention": attention()}
    summary: dict[str, object] = {
        "device": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton_version},
        "milliseconds": {name: compare(contenders, given.rounds) for name, contenders in cases.items()},
    }
    if given.steps:
        with tempfile.TemporaryDirectory() as folder:
            make_data(Path(folder))
            summary["training"] = {
                f"dropout {probability}": train(Path(folder), probability, given)
                for probability in (PROBABILITY, 0.0)
            }
    print(json.dumps(summary, indent=2))
    given.json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def compare(contenders: dict[str, Contender], rounds: int) -> dict[str, float]:
    """Median milliseconds of forward and backward of each contender."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(WARMUP + rounds):
        for name, contender in contenders.items():
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            started.record()
            output = contender()
            output.backward(torch.ones_like(output))
            ended.record()
            ended.synchronize()
            if number >= WARMUP:
                times[name].append(started.elapsed_time(ended))
    return {name: statistics.median(found) for name, found in times.items()}


def draw(*shape: int) -> Tensor:
    """A leaf in bfloat16 on the GPU."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def dropout() -> dict[str, Contender]:
    """Of hidden states, with bias and residual."""
    product, residual = draw(SAMPLES, POSITIONS, HIDDEN), draw(SAMPLES, POSITIONS, HIDDEN)
    bias = draw(HIDDEN)
    tokens = triton_dropout.TokenBits.of(BITS, POSITIONS, product.device)

    def from_host() -> Tensor:
        return random_bits.dropout_add(
            product + bias, residual, BITS, probability=PROBABILITY, layer=LAYER, place=PLACE
        )

    def kernel() -> Tensor:
        return triton_dropout.bias_dropout_add(
            product, bias, residual, tokens, probability=PROBABILITY, layer=LAYER, place=PLACE
        )

    return {
        "no dropout": lambda: residual + (product + bias),
        "torch": lambda: residual + F.dropout(product + bias, PROBABILITY),
        "ours, bits from the CPU": from_host,
        "ours, kernel": kernel,
    }


def attention() -> dict[str, Contender]:
    """Attention without mask."""
    packed = draw(3, SAMPLES, HEADS, POSITIONS, HEAD)
    pairs = triton_attention.PairBits.of(
        BITS, LAYER, heads=range(HEADS), max_positions=POSITIONS, device=packed.device
    )

    def torchs(probability: float) -> Tensor:
        query, key, value = packed
        return F.scaled_dot_product_attention(query, key, value, dropout_p=probability)

    def from_host() -> Tensor:
        lanes = BITS.attention(LAYER, heads=range(HEADS), positions=POSITIONS, max_positions=POSITIONS)
        keep = random_bits.keep_mask(lanes, PROBABILITY).to(packed.device)
        return dot_product.attend(packed, None, keep, PROBABILITY)

    return {
        "torch without dropout": lambda: torchs(0.0),
        "torch": lambda: torchs(PROBABILITY),
        "ours, bits from the CPU": from_host,
        "ours, kernel without dropout": lambda: triton_attention.attend(packed, None, None, probability=0.0),
        "ours, kernel": lambda: triton_attention.attend(packed, None, pairs, probability=PROBABILITY),
    }


def make_data(folder: Path) -> None:
    """The docstrings of the standard library as a corpus, with a vocabulary of their own."""
    build_corpus(folder / "text.txt", workers=1, chosen=installed_sources()[0][:1])
    layout = TextLayout(sentence_per_line=True)
    train_tokenizer([folder / "text.txt"], folder / "vocab.txt", size=16384, layout=layout)
    preprocess([folder / "text.txt"], folder / "vocab.txt", folder / "corpus", layout=layout)


def train(folder: Path, probability: float, given: argparse.Namespace) -> float:
    """Median tokens per second of the steps after the first two, by the run's own metrics."""
    settings = folder / f"config_{probability}.yaml"
    steps = given.steps + 2
    text = SETTINGS.format(folder=folder, probability=probability, steps=steps, precision=given.precision)
    settings.write_text(text, encoding="utf-8")
    subprocess.run([sys.executable, "-m", "megatron_bert_tp.pretrain", str(settings)], check=True)
    lines = (folder / f"run_{probability}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return statistics.median(float(json.loads(line)["tokens_per_second"]) for line in lines[2:])


if __name__ == "__main__":
    main()
