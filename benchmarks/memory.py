"""Memory of a rank: bytes by the formulas, bytes counted with hooks, and growth of the resident process.

    python benchmarks/memory.py [--json benchmarks/results/memory.json]

One model (hidden 512, 8 layers, sequence 256, dropout 0.1, float32) in several layouts on CPU, each layout in
processes of its own.  Counted are distinct storages that autograd saves or deferred work holds, after every pass
of a first step.  Then come the buckets of the gradients and the state of the optimizer.  The growth of the
process is the most that it had resident in a second, uncounted step, less what it had before the model was built:
it holds what else there is too, such as buffers of the backward that no formula has.
"""

import argparse
import json
import multiprocessing
import platform
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert_tp.config.load import load_config
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.model.memory import Layout, deferred_bytes, peak_bytes, stage_bytes
from megatron_bert_tp.model.microbatch_sizes import Microbatch
from megatron_bert_tp.model.recompute import Recompute
from megatron_bert_tp.model.static_memory import (
    gradient_bytes,
    optimizer_bytes,
    parameter_bytes,
    stage_tensors,
)
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.parallel.mesh import MeshShape, ParallelMesh
from megatron_bert_tp.parallel.weight_gradients import WeightGradients, Work
from megatron_bert_tp.pipeline.schedule import orders_of, placement_of
from megatron_bert_tp.training.build import build_pretrainer
from megatron_bert_tp.training.recipe import model_shape, stage_plans
from megatron_bert_tp.training.trainer import Trainer

SAMPLES, SEQUENCE, MASKED, MICROBATCHES = 2, 256, 128, 4
MIB = 1 << 20

SETTINGS = """\
model: {{vocab_size: 16384, hidden_size: 512, num_hidden_layers: 8, num_attention_heads: 8, \
intermediate_size: 2048, max_position_embeddings: 256}}
data: {{corpus: none, tokenizer: none, sequence_length: 256}}
objective: {{pairs: nsp}}
optimizer: {{global_batch: {batch}, steps: 2, learning_rate: 1e-4, warmup_steps: 1}}
parallel: {{microbatch: 2}}
run: {{directory: none, evaluation_samples: 0}}
"""

CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
    "one process, selective": (1, ("parallel.recompute=selective",)),
    "one process, full": (1, ("parallel.recompute=full",)),
    "pipeline 2, 1f1b": (2, ("parallel.pipeline=2", "parallel.schedule=1f1b")),
    "pipeline 2, gpipe": (2, ("parallel.pipeline=2", "parallel.schedule=gpipe")),
    "pipeline 2, zb-h1": (2, ("parallel.pipeline=2", "parallel.schedule=zb-h1")),
    "data 2": (2, ()),
    "data 2, sharded": (2, ("parallel.shard_optimizer=true",)),
}
"""Processes and settings of each layout."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of one rank: saved at the peak of its schedule, and held all the time."""

    activations: int
    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Row:
    """What one rank of one layout takes."""

    layout: str
    rank: int
    formula: Sizes
    counted: Sizes
    process_growth: int


def main() -> None:
    """Measure every layout, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    print(f"{'MiB':<24} rank  activations       weights  gradients  optimizer  all        process growth")
    print(f"{'':<24}       formula  counted")
    rows = []
    for name in CASES:
        for row in measure(name):
            rows.append(row)
            print(line_of(row), flush=True)
    if given.json:
        given.json.write_text(json.dumps(result_of(rows), indent=2) + "\n", encoding="utf-8")


def line_of(row: Row) -> str:
    """One line of the table, in MiB."""
    counted, formula = row.counted, row.formula
    numbers = (counted.parameters, counted.gradients, counted.optimizer, counted.total, row.process_growth)
    static = "  ".join(f"{number / MIB:9.1f}" for number in numbers)
    activations = f"{formula.activations / MIB:9.1f}{counted.activations / MIB:9.1f}"
    return f"{row.layout:<24} {row.rank:>4}{activations}  {static}"


def result_of(rows: Iterable[Row]) -> dict[str, Any]:
    """The table with what it was measured on."""
    return {
        "model": SETTINGS.splitlines()[0],
        "microbatch": {"samples": SAMPLES, "sequence": SEQUENCE, "masked": MASKED, "number": MICROBATCHES},
        "unit": "bytes",
        "rows": [asdict(row) for row in rows],
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def measure(name: str) -> list[Row]:
    """The rows of one layout, from fresh processes."""
    size, _settings = CASES[name]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        answers = context.Queue()
        ranks = [
            context.Process(target=run_rank, args=(name, rank, folder, answers), daemon=True)
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        rows: list[Row] = [answers.get(timeout=300) for _process in ranks]
        for process in ranks:
            process.join()
    return sorted(rows, key=lambda row: row.rank)


def run_rank(name: str, rank: int, folder: str, answers: Any) -> None:
    """One process: build, count a step, then watch the process in another."""
    torch.set_num_threads(1)
    size, overrides = CASES[name]
    settings = Path(folder) / f"settings{rank}.yaml"
    data = size if name.startswith("data") else 1
    settings.write_text(SETTINGS.format(batch=SAMPLES * MICROBATCHES * data), encoding="utf-8")
    config = load_config(settings, list(overrides), world_size=size)
    mesh = mesh_of(config, rank, size, Path(folder) / "store")
    before = resident("VmRSS")
    trainer = trainer_of(config, mesh)
    counted = Sizes(counted_peak(trainer), *held_by(trainer))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak of this process begins anew
    trainer.train_step()
    growth = resident("VmHWM") - before
    answers.put(Row(name, rank, formula_of(config, mesh), counted, growth))
    if size > 1:
        dist.destroy_process_group()


def mesh_of(config: Config, rank: int, size: int, store: Path) -> ParallelMesh:
    """The mesh of this rank over gloo; one process needs no group."""
    if size == 1:
        return ParallelMesh.alone()
    timeout = timedelta(seconds=120)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout
    )
    parallel = config.parallel
    ends = placement_of(parallel.schedule, parallel.pipeline, parallel.virtual).ends
    shape = MeshShape.of_world(size, tensor=parallel.tensor, pipeline=parallel.pipeline, ends=ends)
    return ParallelMesh.build(shape, rank=rank, timeout=timeout)


class MadeTexts:
    """Microbatches of made-up words, all of one size."""

    def __init__(self, config: Config) -> None:
        self._words = config.model.vocab_size

    def take(self, _samples_done: int) -> list[Batch]:
        """The microbatches of a replica's step."""
        generator = np.random.default_rng(1)
        return [self._batch(generator, number) for number in range(MICROBATCHES)]

    def _batch(self, generator: np.random.Generator, number: int) -> Batch:
        ids = torch.from_numpy(generator.integers(5, self._words, (SAMPLES, SEQUENCE)))
        positions = torch.from_numpy(generator.permutation(SAMPLES * SEQUENCE)[:MASKED])
        return Batch(
            input_ids=ids,
            token_type_ids=torch.zeros_like(ids),
            attention_mask=None,
            sample_numbers=tuple(range(SAMPLES * number, SAMPLES * (number + 1))),
            masked_positions=positions,
            masked_labels=ids.flatten()[positions],
            next_sentence_labels=torch.zeros(SAMPLES, dtype=torch.int64),
            num_tokens=SAMPLES * SEQUENCE,
        )


def trainer_of(config: Config, mesh: ParallelMesh) -> Trainer:
    """The trainer of `pretrain`, over made-up text."""
    texts: Any = _Sources(MadeTexts(config))
    agreement = Agreement.of_world(timedelta(seconds=120))
    return build_pretrainer(config, mesh, texts, agreement=agreement, device=torch.device("cpu"))


@dataclass(frozen=True)
class _Sources:
    """Stands for `training.texts.Texts`."""

    training: MadeTexts
    validation: None = None


# What is counted


@dataclass(eq=False)
class Held:
    """A tensor for as long as the graph that saved it."""

    tensor: Tensor


@dataclass
class Counter:
    """Peak of the distinct storages that graphs and deferred work hold; parameters do not count."""

    parameters: set[int]
    saved: WeakSet[Held] = field(default_factory=WeakSet)
    works: WeakSet[Any] = field(default_factory=WeakSet)
    peak: int = 0

    def save(self, tensor: Tensor) -> Held:
        """Hook of autograd; detached, since an output that held its own graph would never be given back."""
        held = Held(tensor.detach())
        self.saved.add(held)
        self.look()
        return held

    def watch_(self, weights: WeightGradients) -> None:
        """Count what is put off as well."""
        put_off = weights.put_off

        @contextmanager
        def counted() -> Iterator[list[Work]]:
            with put_off() as works:
                yield works
            for work in works:
                self.works.add(work)

        weights.put_off = counted  # type: ignore[method-assign]

    def look(self) -> None:
        """Add up what is alive now."""
        tensors = [held.tensor for held in self.saved]
        tensors += [tensor for work in self.works for tensor in tensors_in(work)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        alive = sum(size for address, size in storages.items() if address not in self.parameters)
        self.peak = max(self.peak, alive)


def tensors_in(held: Any) -> list[Tensor]:
    """Tensors that a deferred work is bound to."""
    if isinstance(held, partial):
        return [tensor for each in (held.func, *held.args) for tensor in tensors_in(each)]
    return [held] if isinstance(held, Tensor) else []


def counted_peak(trainer: Trainer) -> int:
    """Bytes of activations in a step, at most; counted whenever something is saved."""
    parameters = (parameter for stage in trainer.chunks for parameter in stage.parameters())
    counter = Counter({parameter.untyped_storage().data_ptr() for parameter in parameters})
    for stage in trainer.chunks:
        counter.watch_(stage.weight_gradients)
    with torch.autograd.graph.saved_tensors_hooks(counter.save, lambda held: held.tensor):
        trainer.train_step()
    return counter.peak


def held_by(trainer: Trainer) -> tuple[int, int, int]:
    """Bytes of weights, of the buckets of gradients, and of moments with what belongs to them."""
    gradients, updater = trainer.updater.gradients, trainer.updater
    sums = [bucket.flat for bucket in (*gradients.buckets, *gradients._apart)]
    states = [tensor for state in updater.optimizer.state.values() for tensor in state.values()]
    return (
        bytes_of(parameter for stage in trainer.chunks for parameter in stage.parameters()),
        bytes_of([*sums, *(bucket.own for bucket in gradients.buckets)]),
        bytes_of(states),
    )


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct storages."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def resident(name: str) -> int:
    """Bytes of this process that are resident: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(value)


# What the formulas say


def formula_of(config: Config, mesh: ParallelMesh) -> Sizes:
    """The same by `model.memory` and `model.static_memory`."""
    parallel, rank = config.parallel, mesh.pipeline.rank
    placement = placement_of(parallel.schedule, parallel.pipeline, parallel.virtual)
    plan = stage_plans(config)[rank]
    layout = Layout(
        shape=model_shape(config),
        element_bytes=4,
        tensor=parallel.tensor,
        splits_sequence=parallel.sequence,
        recompute=Recompute(parallel.recompute, parallel.recompute_every),
    )
    batch = Microbatch.of_rows(SAMPLES, SEQUENCE, masked=MASKED)
    tensors = stage_tensors(layout.shape, plan, tensor=parallel.tensor)
    owners = mesh.data.size if parallel.shard_optimizer else 1
    return Sizes(
        activations=peak_bytes(
            orders_of(parallel.schedule, placement, MICROBATCHES)[rank],
            saved=[stage_bytes(layout, batch, plan)],
            deferred=[deferred_bytes(layout, batch, plan)],
        ),
        parameters=parameter_bytes(tensors, element_bytes=4),
        gradients=gradient_bytes(
            tensors, element_bytes=4, owners=owners, is_tied_here=plan.is_first and plan.is_last
        ),
        optimizer=optimizer_bytes(
            tensors, element_bytes=4, owners=owners, owner=mesh.data.rank if owners > 1 else 0
        ),
    )


if __name__ == "__main__":
    main()
