"""Saving and loading the 345M model's checkpoint (weights and two moments in float32) against the disk itself.

    python benchmarks/checkpoint.py [--folder FOLDER] [--layers 24] [--rounds 5] [--json FILE]

Every round measures, one after another: `dd bs=16M conv=fsync` of as many zeros as a checkpoint has bytes; a save
in the foreground by one process; a save in the background, during which the process multiplies matrices.  Then a
checkpoint that was written by 2 x 2 ranks is loaded at that and at other layouts, by one process that loads the
share of each rank in turn.  Medians are printed.  Moments are random numbers, which no disk can compress.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from megatron_bert_tp.checkpoint.background import Saver
from megatron_bert_tp.checkpoint.directories import Keep, partial_directory, step_directory
from megatron_bert_tp.checkpoint.load import load_parts_, load_rectangles_
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.checkpoint.save import commit_checkpoint, prepare_directory, write_rectangles
from megatron_bert_tp.checkpoint.slices import Rectangle, rectangles
from megatron_bert_tp.model.shape import ModelShape
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.sharding import Part
from megatron_bert_tp.pipeline.partition import partition
from megatron_bert_tp.training.processes import keep_freed_memory

MOMENTS = ("exp_avg", "exp_avg_sq")
SAVED_AT = (2, 2)
LAYOUTS = ((2, 2), (1, 1), (4, 1), (1, 4))
"""Tensor x pipeline."""
STEP_SECONDS, INTERVAL = 30.0, 50
"""Of the 345M on two cores (docs/training.md), and the steps from one save to the next."""
Held = list[tuple[Part, Tensor]]


def main() -> None:
    """Measure saving, then loading."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write (default: here)")
    parser.add_argument("--layers", type=int, default=24, help="layers of the model (default 24)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of saving, and of loading (default 5)")
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    keep_freed_memory()  # as every run does
    shape = ModelShape(30522, 1024, given.layers, 16, 4096, 512, 2)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        saving = measure_saving(Path(folder), shape, given.rounds)
        loading = measure_loading(Path(folder), shape, given.rounds)
    if given.json:
        result = {"model": asdict(shape), **surroundings(), "saving": saving, "loading": loading}
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def surroundings() -> dict[str, object]:
    """What the numbers were measured with."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }


def stages(shape: ModelShape, tensor: int, pipeline: int) -> list[MegatronBertStage]:
    """Every rank's share of the model, with random weights."""
    return [
        MegatronBertStage(shape, plan, axis=Axis("tensor", tuple(range(tensor)), rank))
        for plan in partition(shape.num_hidden_layers, pipeline)
        for rank in range(tensor)
    ]


def held(stage: MegatronBertStage, make: Callable[[tuple[int, ...]], Tensor]) -> dict[str, Held]:
    """Weights and moments of a rank, by kind."""
    parts = list(stage.parts())
    weights = [(part, part.view(part.parameter.detach())) for part in parts]
    return {"weight": weights} | {kind: [(part, make(part.local_shape)) for part in parts] for kind in MOMENTS}


def to_save(stage: MegatronBertStage) -> list[Rectangle]:
    """All that a rank hands in."""
    return [row for kind, tensors in held(stage, torch.randn).items() for row in rectangles(kind, tensors)]


# Saving


def measure_saving(folder: Path, shape: ModelShape, num_rounds: int) -> dict[str, object]:
    """Seconds of dd, of saving and of what saving in the background costs a process that computes."""
    given = to_save(*stages(shape, 1, 1))
    num_bytes = sum(row.tensor.nbytes for row in given)
    num_products = max(1, round(num_bytes / 5e7))  # about as long as a save
    contenders: dict[str, Callable[[], float]] = {
        "dd": lambda: seconds_of_dd(folder / "zeros", num_bytes),
        "save": lambda: save_in_foreground(folder / "root", given),
        "work": lambda: seconds_of_work(num_products),
    }
    rows: dict[str, list[float]] = {
        name: [] for name in (*contenders, "begin", "begin_processor", "work_while_saving", "background")
    }
    for number in range(num_rounds):
        for name, contender in contenders.items():
            rows[name].append(contender())
        for name, seconds in save_in_background(folder / "root", given, num_products).items():
            rows[name].append(seconds)
        print(
            f"round {number + 1}: " + ", ".join(f"{name} {row[-1]:.2f} s" for name, row in rows.items()),
            flush=True,
        )
    shutil.rmtree(folder / "root")
    return saving_summary(num_bytes, rows)


def saving_summary(num_bytes: int, rows: dict[str, list[float]]) -> dict[str, object]:
    """Medians, and what follows from them."""
    seconds = {name: statistics.median(row) for name, row in rows.items()}
    lost = seconds["begin"] + max(0.0, seconds["work_while_saving"] - seconds["work"])
    shares = [dd / save for dd, save in zip(rows["dd"], rows["save"], strict=True)]
    summary = {
        "bytes": num_bytes,
        "seconds": seconds,
        "megabytes_per_second": {name: num_bytes / seconds[name] / 1e6 for name in ("dd", "save")},
        "share_of_dd": statistics.median(shares),
        "hashing_megabytes_per_second": hashing_speed() / 1e6,
        "lost_seconds": lost,
        "step_seconds": STEP_SECONDS,
        "share_of_interval": lost / (INTERVAL * STEP_SECONDS),
        "shortest_step_for_5_percent": lost / (0.05 * INTERVAL),
        "rounds": rows,
    }
    print(json.dumps({key: value for key, value in summary.items() if key != "rounds"}, indent=1))
    return summary


def seconds_of_dd(path: Path, num_bytes: int) -> float:
    """The disk's own speed: zeros in blocks of 16 MiB and one sync at the end."""
    blocks = -(-num_bytes // 2**24)
    command = ["dd", "if=/dev/zero", f"of={path}", "bs=16M", f"count={blocks}", "conv=fsync"]
    seconds = seconds_of(lambda: subprocess.run(command, check=True, capture_output=True))
    path.unlink()
    return seconds * num_bytes / (blocks * 2**24)


def save_in_foreground(root: Path, given: Sequence[Rectangle]) -> float:
    """Seconds of a whole save; what it replaces is removed outside the time."""
    shutil.rmtree(root, ignore_errors=True)
    saver = Saver(root, Agreement.alone(), keep=Keep(last=1), in_background=False)
    seconds = seconds_of(lambda: saver.begin(1, given, facts={}, attachments={}))
    saver.finish()
    return seconds


def save_in_background(root: Path, given: Sequence[Rectangle], num_products: int) -> dict[str, float]:
    """Seconds in which the process stands still, of its work meanwhile, and of the save."""
    shutil.rmtree(root, ignore_errors=True)
    saver = Saver(root, Agreement.alone(), keep=Keep(last=1), in_background=True)
    processor = time.process_time()
    begin = seconds_of(lambda: saver.begin(1, given, facts={}, attachments={}))
    processor = time.process_time() - processor
    work = seconds_of_work(num_products)
    saved = saver.finish()
    assert saved is not None
    return {"begin": begin, "begin_processor": processor, "work_while_saving": work, "background": saved.seconds}


def seconds_of_work(num_products: int) -> float:
    """Seconds of matrix products, each about a tenth of a second on a core that has nothing else to do."""
    left, right = torch.ones(1024, 1024), torch.ones(1024, 4096)
    return seconds_of(lambda: [left @ right for _ in range(num_products)])


def hashing_speed() -> float:
    """SHA-256 of bytes in memory on one core, bytes a second."""
    content = bytes(2**28)
    return len(content) / seconds_of(lambda: hashlib.sha256(content))


# Loading


def measure_loading(folder: Path, shape: ModelShape, num_rounds: int) -> dict[str, object]:
    """Seconds in which all ranks of a layout, in turn, read their share of what 2 x 2 ranks have saved."""
    write_at(folder, shape, *SAVED_AT)
    path = step_directory(folder, 1)
    rows: dict[str, list[float]] = {name(*layout): [] for layout in LAYOUTS}
    verify: list[float] = []
    for _ in range(num_rounds):
        verify.append(seconds_of(lambda: Checkpoint.at(path).verify()))
        for layout in LAYOUTS:
            rows[name(*layout)].append(load_at(path, shape, *layout))
    seconds = {layout: statistics.median(row) for layout, row in rows.items()}
    same = seconds[name(*SAVED_AT)]
    summary = {
        "saved_at": name(*SAVED_AT),
        "verify_seconds": statistics.median(verify),
        "seconds": seconds,
        "ratio_to_the_same_layout": {layout: value / same for layout, value in seconds.items()},
        "rounds": rows,
    }
    print(json.dumps({key: value for key, value in summary.items() if key != "rounds"}, indent=1))
    return summary


def name(tensor: int, pipeline: int) -> str:
    """Of a layout."""
    return f"tensor {tensor} x pipeline {pipeline}"


def write_at(root: Path, shape: ModelShape, tensor: int, pipeline: int) -> None:
    """A checkpoint that every rank of a layout has written its share of."""
    partial, ranks = partial_directory(root, 1, "benchmark"), stages(shape, tensor, pipeline)
    prepare_directory(partial)
    for rank, stage in enumerate(ranks):
        write_rectangles(partial, rank, to_save(stage))
    commit_checkpoint(partial, 1, len(ranks), facts={}, attachments={}, keep=Keep(last=1))


def load_at(path: Path, shape: ModelShape, tensor: int, pipeline: int) -> float:
    """Seconds, summed over the ranks; the modules and moments to be filled are there before."""
    total = 0.0
    for stage in stages(shape, tensor, pipeline):
        tensors = held(stage, torch.ones)

        def load(stage: MegatronBertStage = stage, tensors: dict[str, Held] = tensors) -> None:
            checkpoint = Checkpoint.at(path)
            load_parts_(stage.parts(), checkpoint.weight)
            for kind in MOMENTS:
                load_rectangles_(kind, tensors[kind], checkpoint)

        total += seconds_of(load)
    return total


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds of the clock."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
