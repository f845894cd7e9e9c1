"""What a run tells: lines of the console, records of metrics.jsonl, and its first lines."""

import io
import math
import re

import pytest
from rich.console import Console

from megatron_bert_tp.training.progress import MetricsFile, PretrainingLines, Reporter, read_records
from tests.training.runs import pretrain, succeeded

RECORD = {
    "step": 3, "samples": 24, "loss": 5.0, "mlm_loss": 4.5, "mlm_accuracy": 0.1, "nsp_loss": 0.5,
    "nsp_accuracy": 0.5, "grad_norm": 1.5, "learning_rate": 1e-3, "weight_decay": 0.01, "tokens": 100,
    "tokens_per_second": 50.0, "padding": 0.1, "seconds": 2.0, "data_seconds": 0.1, "seconds_left": 14.0,
    "loss_scale": 4096.0, "skipped": 0,
}  # fmt: skip
SKIPPED = {**RECORD, "step": 4, "grad_norm": math.inf, "skipped": 1}


def told(folder, *given, log_every=1, shows_scale=True, is_terminal=False) -> str:
    """What the console shows of these records."""
    screen = io.StringIO()
    console = Console(file=screen, width=300, force_terminal=is_terminal)
    metrics = MetricsFile(folder / "metrics.jsonl", steps_done=0)
    numbers = {"steps": 10, "steps_done": 2, "log_every": log_every}
    lines = PretrainingLines(shows_scale=shows_scale)
    with Reporter(metrics, console, **numbers, lines=lines) as reporter:
        for record in given:
            reporter.step(record)
    return screen.getvalue()


def test_the_scale_stands_in_the_line_of_float16_alone(tmp_path):
    assert "norm 1.500  rate 1.00e-03  scale 4096  50 tokens/s" in told(tmp_path, RECORD)
    assert "norm 1.500  rate 1.00e-03  50 tokens/s" in told(tmp_path, RECORD, shows_scale=False)


def test_a_skipped_step_is_told_also_between_the_logged_ones(tmp_path):
    lines = told(tmp_path, RECORD, SKIPPED, log_every=100).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("step      4/10")
    assert "norm inf" in lines[0]
    assert "scale 4096 overflowed, step skipped" in lines[0]


def test_the_bar_goes_by_steps(tmp_path):
    bar = told(tmp_path, RECORD, SKIPPED, log_every=100, is_terminal=True).splitlines()[-2]
    assert " 4/10 " in re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", bar)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_null_and_stays_so_when_a_run_goes_on(tmp_path, number):
    path = tmp_path / "metrics.jsonl"
    for steps_done in (0, 4):
        metrics = MetricsFile(path, steps_done=steps_done)
        if not steps_done:
            metrics.write({"kind": "step", **SKIPPED, "grad_norm": number})
        metrics.close()
        assert path.read_text().count('"grad_norm": null') == 1
    (record,) = read_records(path)
    assert math.isnan(record.pop("grad_norm"))
    assert record == {"kind": "step", **{name: value for name, value in SKIPPED.items() if name != "grad_norm"}}


def test_the_first_lines_say_what_is_switched_on(data, tmp_path):
    """And nothing of what is not."""
    settings = (
        "optimizer.name=lamb", "optimizer.steps=1", "optimizer.warmup_steps=0", "run.evaluation_samples=0",
        "parallel.schedule=interleaved", "parallel.virtual=3", "parallel.sequence=true",
        "parallel.shard_optimizer=true", "parallel.recompute=full", "parallel.recompute_every=2",
        "parallel.packing=bins", "parallel.microbatch_tokens=64",
    )  # fmt: skip
    lines = succeeded(pretrain(data, f"run.directory={tmp_path}/all", *settings)).splitlines()
    assert "cpu, float32, interleaved with 3 stages a rank, layers 1, 1, 1" in "\n".join(lines)
    assert "with lamb, full recomputation in 1 layer of 2, packing bins" in lines
    idle = "without effect here: parallel.sequence (tensor size 1), parallel.shard_optimizer (data size 1)"
    assert idle in lines
    plain = succeeded(pretrain(data, f"run.directory={tmp_path}/plain", *settings[1:4])).splitlines()
    assert not any(line.startswith("with ") for line in plain)
