"""What dropout costs on a CPU: torch's own against ours, whose bits no layout changes.

    python benchmarks/random_bits.py [--rounds 15] [--json FILE]

Each case is forward and backward on one thread, and the contenders take turns within a round.  Printed are the
medians of the CPU's time, which other work on the machine does not lengthen by waiting, and of the ratios to
torch's own dropout, taken round by round.  ``no dropout`` is the same work without any, so what dropout costs
is the difference.  Attention is torch's `scaled_dot_product_attention` in both of torch's contenders.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bert_tp.model.dot_product import attend
from megatron_bert_tp.parallel.random_bits import Place, RandomBits, dropout_add, keep_mask
from megatron_bert_tp.training.processes import keep_freed_memory

PROBABILITY, LAYER, WARMUP = 0.1, 1, 2
TORCH = "torch"
Contender = Callable[[], Tensor]


def main() -> None:
    """Measure all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed passes of each contender (default 15)")
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    cases = {
        "hidden 8 x 128 x 256": hidden(8, 128, 256),
        "hidden 4 x 512 x 1024": hidden(4, 512, 1024),
        "attention 8 x 8 heads x 128 x 128": attention(8, 8, 128, 32),
        "attention 4 x 16 heads x 512 x 512": attention(4, 16, 512, 64),
    }
    results = {name: compare(contenders, given.rounds) for name, contenders in cases.items()}
    for name, rows in results.items():
        print(name)
        for contender, row in rows.items():
            print(f"  {contender:<12} {row['milliseconds']:9.2f} ms   {row['ratio']:5.2f} of torch's dropout")
    if given.json:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        summary = {"rounds": given.rounds, "threads": 1, "versions": versions, "cases": results}
        given.json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def compare(contenders: dict[str, Contender], rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each contender, and the median of its ratios to torch's own dropout."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(WARMUP + rounds):
        for name, contender in contenders.items():
            started = time.process_time()
            output = contender()
            output.backward(torch.ones_like(output))
            if number >= WARMUP:
                seconds[name].append(time.process_time() - started)
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(times),
            "ratio": statistics.median(own / theirs for own, theirs in zip(times, seconds[TORCH], strict=True)),
        }
        for name, times in seconds.items()
    }


def hidden(samples: int, positions: int, features: int) -> dict[str, Contender]:
    """Of hidden states: ``residual + dropout(x)``."""
    x = torch.randn(samples, positions, features, requires_grad=True)
    residual = torch.randn(samples, positions, features, requires_grad=True)
    bits = RandomBits(1, tuple(range(samples)))

    def ours() -> Tensor:
        return dropout_add(
            x, residual, bits, probability=PROBABILITY, layer=LAYER, place=Place.MLP_OUTPUT
        )

    return {
        "no dropout": lambda: residual + x,
        TORCH: lambda: residual + F.dropout(x, PROBABILITY),
        "ours": ours,
    }


def attention(samples: int, heads: int, positions: int, head_size: int) -> dict[str, Contender]:
    """Attention with dropout on the probabilities."""
    packed = torch.randn(3, samples, heads, positions, head_size, requires_grad=True)
    bits = RandomBits(1, tuple(range(samples)))

    def torchs(probability: float) -> Tensor:
        query, key, value = packed
        return F.scaled_dot_product_attention(query, key, value, dropout_p=probability)

    def ours() -> Tensor:
        lanes = bits.attention(LAYER, heads=range(heads), positions=positions, max_positions=positions)
        return attend(packed, None, keep_mask(lanes, PROBABILITY), PROBABILITY)

    return {"no dropout": lambda: torchs(0.0), TORCH: lambda: torchs(PROBABILITY), "ours": ours}


if __name__ == "__main__":
    main()
