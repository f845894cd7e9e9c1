"""One process on CPU: this package against `transformers` in a plain loop, same model, data and settings.

    python benchmarks/single_process.py [--rounds 3] [--steps 6] [--tuned] [--json FILE]

Each contender runs in a process of its own, in turn, and so neither inherits the other's memory or threads.
Both read the same batches (real English text) from the same initial weights, with dropout 0.1, gradient
clipping and torch's fused AdamW.  Printed are tokens per second (median over rounds), the ratio round by round,
and the losses of the last step.  ``--tuned`` gives the memory settings of this package to both contenders.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_bert_tp.config.load import load_config
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.data.preprocessing.documents import TextLayout
from megatron_bert_tp.data.preprocessing.preprocess import preprocess
from megatron_bert_tp.data.preprocessing.vocabulary_training import train_tokenizer
from megatron_bert_tp.demo.corpus import build_corpus
from megatron_bert_tp.demo.sources import installed_sources
from megatron_bert_tp.model.initialisation import initial_tensor
from megatron_bert_tp.model.shape import tensor_shapes
from megatron_bert_tp.optim.roles import is_decayed
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.parallel.cross_entropy import IGNORED
from megatron_bert_tp.parallel.mesh import Axis, ParallelMesh
from megatron_bert_tp.training.build import build_pretrainer
from megatron_bert_tp.training.processes import keep_freed_memory
from megatron_bert_tp.training.recipe import model_shape
from megatron_bert_tp.training.texts import open_texts

THREADS, WARMUP = 2, 2
Step = Callable[[int], tuple[float, int]]
"""Step number to (loss, real tokens)."""

SETTINGS = """\
model: {{vocab_size: 30592, hidden_size: 256, num_hidden_layers: 8, num_attention_heads: 8, \
intermediate_size: 1024, max_position_embeddings: 128}}
data: {{corpus: "{folder}/corpus", tokenizer: "{folder}/vocab.txt", sequence_length: 128}}
objective: {{pairs: nsp}}
optimizer: {{global_batch: 32, steps: 1000, learning_rate: 1e-4, warmup_steps: 10}}
parallel: {{microbatch: 8}}
run: {{directory: "{folder}/run", evaluation_samples: 0}}
"""


def main() -> None:
    """Run the rounds, or with ``--contender`` be one side of one round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each contender (default 3)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a process (default 6)")
    parser.add_argument("--tuned", action="store_true", help="our memory settings for transformers too")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--contender", choices=sorted(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.contender:
        print(json.dumps(measure(given.contender, given.folder, steps=given.steps, tuned=given.tuned)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        compare(given, Path(folder))


def make_data(folder: Path) -> None:
    """The docstrings of the standard library as a corpus, with a vocabulary of their own."""
    python = installed_sources()[0][:1]
    build_corpus(folder / "text.txt", workers=1, chosen=python)
    layout = TextLayout(sentence_per_line=True)
    train_tokenizer([folder / "text.txt"], folder / "vocab.txt", size=16384, layout=layout)
    preprocess([folder / "text.txt"], folder / "vocab.txt", folder / "corpus", layout=layout)
    (folder / "config.yaml").write_text(SETTINGS.format(folder=folder), encoding="utf-8")


def compare(given: argparse.Namespace, folder: Path) -> None:
    """Alternate the contenders and print what came out."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for number in range(given.rounds):
        for name in CONTENDERS:
            results[name].append(run_contender(name, given, folder))
            fields = results[name][-1]
            speed, loss = fields["tokens_per_second"], fields["loss"]
            print(f"round {number + 1}  {name:<16} {speed:8,.0f} tokens/s  loss {loss:.4f}", flush=True)
    speeds = {name: [run["tokens_per_second"] for run in runs] for name, runs in results.items()}
    pairs = zip(*speeds.values(), strict=True)
    ratios = [ours / theirs for ours, theirs in pairs]
    summary = {
        "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "loss": {name: runs[-1]["loss"] for name, runs in results.items()},
        "tuned": given.tuned,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    for name, speed in summary["tokens_per_second"].items():
        print(f"{name:<16} {speed:8,.0f} tokens/s (median)  loss {summary['loss'][name]:.4f}")
    print(f"ratio {summary['ratio']:.2f} (rounds: {', '.join(f'{ratio:.2f}' for ratio in ratios)})")
    if given.json:
        given.json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def run_contender(name: str, given: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One contender in a fresh process."""
    command = [sys.executable, __file__, "--contender", name, "--folder", str(folder), "--steps", str(given.steps)]
    output = subprocess.run(
        command + ["--tuned"] * given.tuned, check=True, capture_output=True, text=True
    ).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def measure(name: str, folder: Path, *, steps: int, tuned: bool) -> dict[str, float]:
    """Tokens per second over ``steps`` steps after the warm-up, and the last loss."""
    torch.set_num_threads(THREADS)
    if name == "megatron_bert_tp" or tuned:
        keep_freed_memory()
    step = CONTENDERS[name](load_config(folder / "config.yaml"))
    for number in range(WARMUP):
        step(number)
    started = time.perf_counter()
    done = [step(WARMUP + number) for number in range(steps)]
    seconds = time.perf_counter() - started
    return {"tokens_per_second": sum(tokens for _, tokens in done) / seconds, "loss": done[-1][0]}


def package_step(config: Config) -> Step:
    """A step of this package's own trainer."""
    texts = open_texts(config, Axis.alone("data"), say=print)
    cpu = torch.device("cpu")
    trainer = build_pretrainer(config, ParallelMesh.alone(), texts, agreement=Agreement.alone(), device=cpu)

    def step(_number: int) -> tuple[float, int]:
        report = trainer.train_step()
        return report.losses.loss, report.work.tokens

    return step


def transformers_step(config: Config) -> Step:
    """A step of the plain loop that one writes around `transformers`."""
    from transformers import MegatronBertConfig, MegatronBertForPreTraining

    shape = model_shape(config)
    sizes = {name: getattr(shape, name) for name in shape.__dataclass_fields__}
    model = MegatronBertForPreTraining(MegatronBertConfig(**sizes)).train()
    weights = {
        name: initial_tensor(name, size, seed=config.optimizer.seed, deviation=shape.initializer_range)
        for name, size in tensor_shapes(shape).items()
    }
    weights["bert.embeddings.word_embeddings.weight"][shape.pad_token_id] = 0
    model.load_state_dict(weights, strict=False)
    decayed = [value for name, value in model.named_parameters() if is_decayed(name)]
    others = [value for name, value in model.named_parameters() if not is_decayed(name)]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, eps=1e-8, fused=True)
    texts = open_texts(config, Axis.alone("data"), say=print)

    def step(number: int) -> tuple[float, int]:
        batches = texts.training.take(number * config.optimizer.global_batch)
        losses = []
        for batch in batches:
            loss = model(**transformers_inputs(batch)).loss / len(batches)
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * min(1.0, (number + 1) / config.optimizer.warmup_steps)
        optimizer.step()
        optimizer.zero_grad()
        return sum(losses), sum(batch.num_tokens for batch in batches)

    return step


def transformers_inputs(batch: Batch) -> dict[str, torch.Tensor | None]:
    """The same microbatch as keyword arguments: labels at every position, -100 where there is none."""
    labels = torch.full((batch.input_ids.numel(),), IGNORED)
    is_label = batch.masked_labels != IGNORED
    labels[batch.masked_positions[is_label]] = batch.masked_labels[is_label]
    mask = batch.attention_mask
    return {
        "input_ids": batch.input_ids,
        "token_type_ids": batch.token_type_ids,
        "attention_mask": None if mask is None else mask.long(),
        "labels": labels.view_as(batch.input_ids),
        "next_sentence_label": batch.next_sentence_labels,
    }


CONTENDERS: dict[str, Callable[[Config], Step]] = {
    "megatron_bert_tp": package_step,
    "transformers": transformers_step,
}


if __name__ == "__main__":
    main()
