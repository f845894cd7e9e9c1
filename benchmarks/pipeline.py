"""Pipelines of two processes against the simulator, and zero-bubble against 1F1B.

    python benchmarks/pipeline.py [--rounds 15] [--json FILE]

Two processes, each bound to one core and one thread, hold four equal layers each (hidden 256, microbatches of
4 x 128 tokens, dropout 0.1).  In every round each schedule takes one step, in turn; before it, both processes
together time one pass of each kind, without messages, and one message.  The simulator is given those times, and
the ratio of the measured to the simulated step is taken round by round.  Last come the ratios of ZB-H1 to 1F1B at
4 microbatches, with the interval that holds their median in 95% of resamplings.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from megatron_bert_tp.model.initialisation import initialise_
from megatron_bert_tp.model.shape import ModelShape
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.parallel.collectives import maximum_over_
from megatron_bert_tp.parallel.mesh import Axis, MeshShape, ParallelMesh
from megatron_bert_tp.parallel.weight_gradients import WeightGradients
from megatron_bert_tp.pipeline.executor import Executor
from megatron_bert_tp.pipeline.instructions import Program
from megatron_bert_tp.pipeline.partition import StagePlan
from megatron_bert_tp.pipeline.placement import Placement
from megatron_bert_tp.pipeline.schedule import placement_of, programs
from megatron_bert_tp.pipeline.simulate import Durations, simulate
from megatron_bert_tp.training.processes import keep_freed_memory

RANKS, LAYERS = 2, 8
SHAPE = ModelShape(
    vocab_size=30592,
    hidden_size=256,
    num_hidden_layers=LAYERS + 2,  # the first and the last one, which nobody holds, would have embeddings and head
    num_attention_heads=8,
    intermediate_size=1024,
    max_position_embeddings=128,
    type_vocab_size=2,
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
)
ROWS, SEQUENCE = 4, 128
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb-h1": 1, "zb-v": 2}
MICROBATCHES = (4, 8)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rows:
    """A microbatch of hidden states in place of text: what `MegatronBertStage` reads of a batch."""

    input_ids: Tensor
    token_type_ids: Tensor
    sample_numbers: tuple[int, ...]
    hidden: Tensor
    attention_mask: Tensor | None = None
    packed_lengths: tuple[int, ...] | None = None
    position_ids: Tensor | None = None


class EqualStage:
    """Layers without embeddings or head, so that all stages cost the same; the first reads the batch's states."""

    def __init__(self, layers: range) -> None:
        plan = StagePlan(is_first=False, is_last=False, layers=layers)
        self.stage = MegatronBertStage(SHAPE, plan, axis=Axis.alone("tensor"))
        initialise_(self.stage, seed=1)
        self.dtype = self.stage.dtype
        self.weight_gradients: WeightGradients = self.stage.weight_gradients

    def __call__(self, received: Tensor | None, batch: Rows) -> Any:
        """Hidden states to hidden states."""
        return self.stage(batch.hidden if received is None else received, batch)

    def boundary_shape(self, batch: Rows) -> tuple[int, ...]:
        """Shape of a message."""
        return self.stage.boundary_shape(batch)

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self.stage.parameters():
            parameter.grad = None


def loss_of(output: Tensor, _batch: Rows) -> tuple[Tensor, Tensor]:
    """A loss that costs nothing beside the layers."""
    return output.sum(), output.detach()[0, 0]


def main() -> None:
    """Measure, print the table, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="steps of every schedule (default 15)")
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < RANKS:
        sys.exit(f"needs {RANKS} cores, but this process may use {len(cores)} alone; free another one")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rounds.json"
        spawn(run_rank, (cores[:RANKS], folder, given.rounds, str(path)), nprocs=RANKS)
        rounds = json.loads(path.read_text(encoding="utf-8"))
    result = summary(rounds)
    show(result)
    if given.json:
        result["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def run_rank(rank: int, cores: list[int], folder: str, num_rounds: int, path: str) -> None:
    """One process of the pipeline; the first writes what was measured."""
    os.sched_setaffinity(0, {cores[rank]})
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    shape = MeshShape.of_world(RANKS, tensor=1, pipeline=RANKS)
    mesh = ParallelMesh.build(shape, rank=rank, timeout=timedelta(seconds=120))
    pipelines = [Pipeline(name, num, mesh) for name in SCHEDULES for num in MICROBATCHES]
    rounds = []
    for number in range(num_rounds + 1):
        measured = [pipeline.measure() for pipeline in pipelines]
        if number:  # the first warms up
            rounds.append(measured)
    if rank == 0:
        Path(path).write_text(json.dumps(rounds), encoding="utf-8")
    dist.destroy_process_group()


class Pipeline:
    """One schedule with one number of microbatches, on one rank."""

    def __init__(self, name: str, num_microbatches: int, mesh: ParallelMesh) -> None:
        self.name, self.mesh = name, mesh
        self.placement: Placement = placement_of(name, RANKS, SCHEDULES[name])
        per_stage = LAYERS // self.placement.num_stages
        own = self.placement.stages[mesh.pipeline.rank]
        self.stages = [EqualStage(range(1 + s * per_stage, 1 + (s + 1) * per_stage)) for s in own]
        self.all_programs: tuple[Program, ...] = programs(name, self.placement, num_microbatches)
        self.batches = [make_rows(number) for number in range(num_microbatches)]
        self.executor = Executor[Rows](
            self.stages,
            loss_of,
            placement=self.placement,
            axis=mesh.pipeline,
            channels=mesh.channels,
            device=CPU,
        )

    def measure(self) -> dict[str, Any]:
        """Seconds of a step, and what the simulator makes of the times of its passes and messages."""
        durations = self.durations()
        simulated = simulate(self.all_programs, self.placement, durations)
        for stage in self.stages:
            stage.clear()
        program = self.all_programs[self.mesh.pipeline.rank]
        seconds = together(self.mesh, lambda: self.executor.run(program, self.batches))
        return {
            "schedule": self.name,
            "microbatches": len(self.batches),
            "seconds": seconds,
            "simulated": simulated.length,
            "idle": simulated.idle_share,
            "busy": (1 - simulated.idle_share) * simulated.length,
        }

    def durations(self) -> Durations:
        """Times of the passes of all virtual stages, both processes at work, and of one message."""
        own = [self.passes(stage) for stage in self.stages]
        table = torch.zeros(self.placement.num_stages, 4, dtype=torch.float64)
        for stage, times in zip(self.placement.stages[self.mesh.pipeline.rank], own, strict=True):
            table[stage] = torch.tensor(times)
        dist.all_reduce(table)
        forward, backward, inputs, weights = (tuple(column.tolist()) for column in table.T)
        transfer = message_seconds(self.mesh, self.stages[0].boundary_shape(self.batches[0]))
        return Durations(forward, backward, transfer, weights, inputs)

    def passes(self, stage: EqualStage) -> tuple[float, float, float, float]:
        """Mean seconds of a forward, a joint backward, an input-gradient and a weight-gradient pass."""
        batches = self.batches[:4]
        splits = self.name.startswith("zb")
        dist.barrier()
        outputs, forward = timed(lambda: [self.forward(stage, batch) for batch in batches])
        grads = [torch.ones_like(output) for output in outputs]
        if not splits:
            _, backward = timed(lambda: [o.backward(g) for o, g in zip(outputs, grads, strict=True)])
            return forward / len(batches), backward / len(batches), 0.0, 0.0
        with stage.weight_gradients.put_off() as work:
            _, inputs = timed(lambda: [o.backward(g) for o, g in zip(outputs, grads, strict=True)])
        _, weights = timed(lambda: [task() for task in work])
        number = len(batches)
        return forward / number, (inputs + weights) / number, inputs / number, weights / number

    def forward(self, stage: EqualStage, batch: Rows) -> Tensor:
        """One pass as in the middle of the pipeline: the states that are received need a gradient."""
        received = batch.hidden.detach().requires_grad_()
        output: Tensor = stage(received, batch)
        return output


def make_rows(number: int) -> Rows:
    generator = torch.Generator().manual_seed(number)
    ids = torch.zeros(ROWS, SEQUENCE, dtype=torch.int64)
    hidden = torch.randn(ROWS, SEQUENCE, SHAPE.hidden_size, generator=generator)
    return Rows(ids, ids, tuple(range(ROWS * number, ROWS * (number + 1))), hidden)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def together(mesh: ParallelMesh, work: Callable[[], Any]) -> float:
    """Seconds until the last of both processes is done."""
    dist.barrier()
    _, seconds = timed(work)
    return maximum_over_(torch.tensor([seconds], dtype=torch.float64), mesh.pipeline).item()


def message_seconds(mesh: ParallelMesh, shape: tuple[int, ...], *, number: int = 10) -> float:
    """Mean seconds of a message of hidden states from one process to the other."""
    tensor, rank = torch.zeros(shape), mesh.pipeline.rank

    def back_and_forth() -> None:
        for _ in range(number):
            for source in range(RANKS):
                send_or_receive = dist.send if source == rank else dist.recv
                send_or_receive(tensor, 1 - rank, mesh.channels[source, 1 - source])

    return together(mesh, back_and_forth) / (2 * number)


def summary(rounds: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds of each schedule and number of microbatches, and the pairs of ZB-H1 and 1F1B."""
    rows = []
    for column in zip(*rounds, strict=True):
        ratios = [entry["seconds"] / entry["simulated"] for entry in column]
        rows.append(
            {
                "schedule": column[0]["schedule"],
                "microbatches": column[0]["microbatches"],
                "seconds": statistics.median(entry["seconds"] for entry in column),
                "simulated_seconds": statistics.median(entry["simulated"] for entry in column),
                "simulated_idle": statistics.median(entry["idle"] for entry in column),
                "measured_idle": statistics.median(1 - e["busy"] / e["seconds"] for e in column),
                "ratio": statistics.median(ratios),
                "ratio_interval": interval(ratios),
            }
        )
    pairs = [
        of(entries, "zb-h1", 4)["seconds"] / of(entries, "1f1b", 4)["seconds"] for entries in rounds
    ]
    simulated = [
        of(entries, "zb-h1", 4)["simulated"] / of(entries, "1f1b", 4)["simulated"] for entries in rounds
    ]
    comparison = {
        "pairs": len(pairs),
        "median": statistics.median(pairs),
        "interval": interval(pairs),
        "simulated": statistics.median(simulated),
    }
    return {"rows": rows, "zb-h1 / 1f1b, 4 microbatches": comparison}


def of(entries: Sequence[dict[str, Any]], name: str, num_microbatches: int) -> dict[str, Any]:
    return next(e for e in entries if (e["schedule"], e["microbatches"]) == (name, num_microbatches))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Bounds of the median in 95% of 10,000 resamplings."""
    generator = random.Random(0)
    medians = sorted(
        statistics.median(generator.choices(values, k=len(values))) for _ in range(10_000)
    )
    return medians[250], medians[-251]


def show(result: dict[str, Any]) -> None:
    """The table, and the line of the comparison."""
    table = Table("schedule", "microbatches", "ms a step", "simulated", "ratio", "95%", "idle", "simulated idle")
    for row in result["rows"]:
        table.add_row(
            row["schedule"],
            str(row["microbatches"]),
            f"{1000 * row['seconds']:.0f}",
            f"{1000 * row['simulated_seconds']:.0f}",
            f"{row['ratio']:.3f}",
            "{:.3f} to {:.3f}".format(*row["ratio_interval"]),
            f"{row['measured_idle']:.1%}",
            f"{row['simulated_idle']:.1%}",
        )
    Console(width=120).print(table)
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}))


if __name__ == "__main__":
    main()
