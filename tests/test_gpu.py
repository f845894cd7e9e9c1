"""On a CUDA device: a run against the same run on the CPU, and the collectives over NCCL.

One device is enough, so the process group has one rank, whose messages are sent all the same.
"""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert_tp.parallel import collectives
from megatron_bert_tp.parallel.mesh import Axis
from tests.parallel.triton_checks.processes import needs_gpu
from tests.training.runs import pretrain, records, succeeded

STEPS = 6
RUN = ("model.num_hidden_layers=2", f"optimizer.steps={STEPS}", "optimizer.learning_rate=1e-3",
       "optimizer.precision=float32", "run.save_every=100", "run.evaluate_every=100")  # fmt: skip
# Two orders of float32 sums are 1e-6 apart in a gradient.  Adam divides by the size of the gradient, so where that
# is small an update of up to the rate may differ: at most all of 6 x 1e-3, in weights that the loss hardly feels.
CURVE = 1e-3
# The first loss has seen no update.
FIRST = 1e-5


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("setting", ["data.packing=none", "data.packing=packed", "parallel.recompute=full"])
def test_a_run_with_dropout_follows_that_of_the_cpu(data, tmp_path, setting):
    curves = []
    for device in ("cuda", "cpu"):
        folder = tmp_path / device
        succeeded(pretrain(data, *RUN, f"run.directory={folder}", f"run.device={device}", setting))
        curves.append([record["loss"] for record in records(folder, "step")])
    found, truth = curves
    assert len(truth) == STEPS
    assert found[0] == pytest.approx(truth[0], rel=FIRST)
    assert found == pytest.approx(truth, rel=CURVE)


class _Counted(int):
    """One rank that takes itself for several: nothing is left out as needless, and all sizes are those of one."""

    def __gt__(self, _other: object) -> bool:
        return True

    def __eq__(self, _other: object) -> bool:
        return False

    __hash__ = int.__hash__


class _AxisOfOne(Axis):
    """An axis of one rank over which everything is sent."""

    @property
    def size(self) -> int:
        return _Counted(1)


def sent(x: Tensor, axis: Axis) -> dict[str, Tensor]:
    """What every collective gives for ``x`` ``[rows, features]``; over one rank that is ``x``."""
    summing = x.clone()
    collectives.finish(collectives.start_sum_over_(summing, axis), axis)
    share, whole = torch.zeros_like(x), torch.zeros_like(x)
    collectives.finish(collectives.start_reduce_scatter(share, x.clone(), axis), axis)
    collectives.finish(collectives.start_all_gather(whole, x.clone(), axis), axis)
    gathered, work = collectives.start_gather_rows(x, axis)
    collectives.finish(work, axis)
    return {
        "sum_over_": collectives.sum_over_(x.clone(), axis),
        "start_sum_over_": summing,
        "maximum_over_": collectives.maximum_over_(x.clone(), axis),
        "gather_over": collectives.gather_over(x, axis, dim=1),
        "own_part": collectives.own_part(x, axis, dim=1),
        "start_reduce_scatter": share,
        "start_all_gather": whole,
        "reduce_scatter_over": collectives.reduce_scatter_over(x, axis),
        "gather_rows_over": collectives.gather_rows_over(x, axis),
        "start_gather_rows": gathered,
    }


PAIRS = ("copy_to", "reduce_from", "scatter_to", "gather_from", "scatter_sum_to")


def check_collectives(device: torch.device, axis: Axis) -> None:
    x = torch.arange(12.0, device=device).view(4, 3)
    for name, found in sent(x, axis).items():
        assert found.device == x.device
        assert torch.equal(found, x), name
    for name in PAIRS:
        leaf = x.clone().requires_grad_()
        output = getattr(collectives, name)(leaf, axis)
        output.backward(2 * x)
        assert output.grad_fn is not None, name
        assert torch.equal(output, x), name
        assert torch.equal(leaf.grad, 2 * x), name


@pytest.mark.parametrize(
    ("backend", "kind"),
    [("gloo", "cpu"), pytest.param("nccl", "cuda", marks=[pytest.mark.gpu, needs_gpu])],
)
def test_collectives_over_one_rank(monkeypatch, backend, kind):
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    used = []
    flat = ["all_gather_single", "reduce_scatter_single"]
    if not hasattr(dist, flat[0]):  # before torch 2.13
        flat = ["all_gather_into_tensor", "reduce_scatter_tensor"]
    names = ["all_reduce", "all_gather", *flat]
    given = {"store": dist.HashStore(), "rank": 0, "world_size": 1, "timeout": timedelta(seconds=60)}
    dist.init_process_group(backend, device_id=device if kind == "cuda" else None, **given)
    try:
        for name in names:
            monkeypatch.setattr(dist, name, _noting(used, name))
        check_collectives(device, _AxisOfOne("tensor", (0,), 0, dist.group.WORLD))
    finally:
        dist.destroy_process_group()
    assert set(used) == set(names)


def _noting(used: list[str], name: str):
    send = getattr(dist, name)

    def noted(*given, **named):
        used.append(name)
        return send(*given, **named)

    return noted
