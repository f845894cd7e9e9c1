"""A schedule of one's own through the command: the bits of the built-in one, and mistakes that are told."""

import re

import pytest

from megatron_bert_tp.pipeline.schedule import orders_of, placement_of
from megatron_bert_tp.pipeline.schedule_file import write_schedule
from tests.training.runs import pretrain, records, succeeded, without_times

SHORT = ("optimizer.steps=3", "optimizer.warmup_steps=1", "run.evaluation_samples=0")
FILE = "parallel.schedule=file"


@pytest.fixture
def zero_bubble(tmp_path):
    """zb-h1 for two processes and four microbatches, as a file."""
    placement = placement_of("zb-h1", 2, 1)
    path = tmp_path / "zb-h1.txt"
    path.write_text(write_schedule(orders_of("zb-h1", placement, 4), placement), encoding="utf-8")
    return path


def test_a_file_of_a_schedule_gives_the_bits_of_the_schedule(data, tmp_path, zero_bubble):
    ways = {"file": (FILE, f"parallel.schedule_file={zero_bubble}"), "named": ("parallel.schedule=zb-h1",)}
    said = {
        name: succeeded(
            pretrain(data, f"run.directory={tmp_path}/{name}", "parallel.pipeline=2", *SHORT, *way, processes=2)
        )
        for name, way in ways.items()
    }
    rows = [without_times(records(tmp_path / name, "step")) for name in ways]
    assert len(rows[0]) == 3
    assert rows[0] == rows[1]
    assert f"float32, schedule of {zero_bubble}, layers" in said["file"]
    assert "float32, zb-h1, layers" in said["named"]


def test_a_file_that_is_not_there_is_named(data, tmp_path):
    done = pretrain(data, f"run.directory={tmp_path}/run", FILE, f"parallel.schedule_file={tmp_path}/none.txt")
    assert done.returncode == 2
    assert f"error: {tmp_path}/none.txt" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_for_another_pipeline_is_refused_with_both_sizes(data, tmp_path, zero_bubble):
    done = pretrain(data, f"run.directory={tmp_path}/run", FILE, f"parallel.schedule_file={zero_bubble}")
    assert done.returncode == 2
    assert " of 1 stages each, but parallel.pipeline is 1" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["optimizer.global_batch=4"], "has 4 microbatches, but a replica's share of this step has 2"),
        (
            [f"optimizer.batch_ramp.{name}" for name in ("start=2", "increment=2", "samples=12")],
            "has 4 microbatches, but a replica's share of this step has 1",
        ),
        (["parallel.packing=bins", "parallel.microbatch_tokens=64"], "set parallel.packing: none"),
    ],
    ids=["batch", "ramp", "packing"],
)
def test_a_file_for_another_number_of_microbatches_is_refused_before_the_first_step(
    data, tmp_path, zero_bubble, overrides, told
):
    given = ("parallel.pipeline=2", FILE, f"parallel.schedule_file={zero_bubble}", *overrides)
    done = pretrain(data, f"run.directory={tmp_path}/run", *given, processes=2)
    assert re.search(r"exitcode\s*: 2 ", done.stderr), done.stderr
    assert len(re.findall(rf"^error on rank \d: .*{re.escape(told)}", done.stderr, re.MULTILINE)) == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
