"""Fine-tuning and evaluation, on ranks of the pool or as commands, and what they leave behind."""

import json
from contextlib import nullcontext, redirect_stdout
from enum import Enum
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert_tp.config.environment import LaunchEnvironment
from megatron_bert_tp.config.load import load_task
from megatron_bert_tp.training.evaluating import evaluate
from megatron_bert_tp.training.finetuning import finetune
from tests.pool import RankPool
from tests.support import Layout
from tests.training.runs import records, without_times

FINETUNE, EVALUATE = "megatron_bert_tp.finetune", "megatron_bert_tp.evaluate"
ENTRIES = {"finetune": finetune, "evaluate": evaluate}


def run_rank(purpose: str, settings: Path, overrides: tuple[str, ...]) -> str:
    """What the entry point prints on this rank of the pool, which has made the process group already."""
    environment = LaunchEnvironment(rank=dist.get_rank(), world_size=dist.get_world_size())
    config = load_task(settings, overrides, purpose=purpose, world_size=environment.world_size)
    told = StringIO()
    with patch("megatron_bert_tp.training.session.process_group", lambda *_: nullcontext()), redirect_stdout(told):
        ENTRIES[purpose](config, environment)
    return told.getvalue()


def layout_settings(layout: Layout) -> tuple[str, ...]:
    """Overrides that spread a run."""
    values: dict[str, object] = {
        "parallel.tensor": layout.tensor,
        "parallel.pipeline": layout.pipeline,
        "parallel.schedule": layout.schedule,
        "parallel.virtual": layout.virtual,
        "parallel.shard_optimizer": layout.shards,
    }
    if layout.packing != "none":
        values |= {"parallel.packing": layout.packing, "parallel.microbatch": None}
        values |= {"parallel.microbatch_tokens": 256}
    return tuple(
        f"{path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in values.items()
    )


def name_of(value: object) -> str:
    """Name of a layout, a kind or a signal in the name of a test."""
    if isinstance(value, Enum):
        return value.name
    if not isinstance(value, Layout):
        return str(value)
    sizes = {"data": value.data, "pipeline": value.pipeline, "tensor": value.tensor}
    spread = "-".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1) or "alone"
    return spread if value.packing == "none" else f"{spread}-{value.packing}"


def tune(ranks: RankPool, settings: Path, folder: Path, *overrides: str, layout: Layout | None = None) -> Path:
    """Fine-tune on ranks of the pool; gives the folder of the run."""
    spread = layout or Layout()
    given = (f"run.directory={folder}", *layout_settings(spread), *overrides)
    ranks.run(spread.world, run_rank, "finetune", settings, given)
    return folder


def measure(
    ranks: RankPool, settings: Path, model: Path, folder: Path, *overrides: str, layout: Layout | None = None
) -> dict[str, dict[str, float]]:
    """Evaluate a model on ranks of the pool; gives metrics by part."""
    spread = layout or Layout()
    given = (f"run.directory={folder}", f"model.weights={model}", *layout_settings(spread), *overrides)
    ranks.run(spread.world, run_rank, "evaluate", settings, given)
    return read_json(folder / "metrics.json")


def losses_of(folder: Path) -> list[float]:
    """Loss of each step."""
    return [row["loss"] for row in records(folder, "step")]


def evaluations_of(folder: Path) -> list[dict[str, float]]:
    """Evaluations, without what tells time."""
    return without_times(records(folder, "evaluation"))


def result_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / "result.json")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def predictions_of(folder: Path, part: str = "validation") -> list[dict[str, Any]]:
    lines = (folder / f"predictions.{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def exported(folder: Path) -> dict[str, Tensor]:
    """Tensors of the Hugging Face directory that a run has written."""
    from safetensors.torch import load_file

    files = sorted((folder / "model").glob("*.safetensors"))
    assert files
    return {name: value for file in files for name, value in load_file(file).items()}


def products_of(folder: Path) -> dict[str, bytes]:
    """Bytes of all that a run is made for: result, predictions, files for benchmarks and the model.

    The model's card is left out: it tells how long steps took.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_product = name.startswith(("model/", "submission/", "predictions", "result", "summary"))
        if path.is_file() and is_product and path.name != "README.md":
            found[name] = path.read_bytes()
    assert found
    return found


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
