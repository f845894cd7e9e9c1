"""NVIDIA's apex: only arguments that it documents, and the same numbers where it is installed."""

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_bert_tp.errors import ConfigError
from megatron_bert_tp.optim import apex
from megatron_bert_tp.optim.rules import OptimizerNumbers, build_optimizer, moment_of, step_
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.ownership import Owned
from tests.optim.rectangles import WHOLES, gradients_of, owned_of

# Facts: the arguments after ``params`` in the ``__init__`` of the class, in github.com/NVIDIA/apex.
# apex/optimizers/fused_adam.py; later versions add capturable and master_weights.
FUSED_ADAM = {"lr", "bias_correction", "betas", "eps", "adam_w_mode", "weight_decay", "amsgrad", "set_grad_none"}
# apex/optimizers/fused_lamb.py
FUSED_LAMB = {*FUSED_ADAM, "grad_averaging", "max_grad_norm", "use_nvlamb"}
# apex/normalization/fused_layer_norm.py: MixedFusedLayerNorm(normalized_shape, eps=1e-5, **given)
BETAS = (0.8, 0.95)


class Recorder(torch.optim.Optimizer):
    """Stands in for a class of apex: keeps what it was called with, and moves nothing."""

    def __init__(self, params: list[dict[str, Any]], **given: Any) -> None:
        self.given = given
        super().__init__(params, {"lr": 1e-3, **given})

    def step(self, closure: None = None) -> None:
        assert closure is None


@pytest.fixture
def stand_in(monkeypatch) -> None:
    """Modules with the names of apex, whose classes are recorders."""
    optimizers, normalization = ModuleType("apex.optimizers"), ModuleType("apex.normalization")
    optimizers.FusedAdam = optimizers.FusedLAMB = Recorder
    normalization.MixedFusedLayerNorm = torch.nn.LayerNorm
    for module in (ModuleType("apex"), optimizers, normalization):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def built(name: str, owned: list[Owned], fused: str = "apex") -> torch.optim.Optimizer:
    numbers = OptimizerNumbers(name=name, beta1=BETAS[0], beta2=BETAS[1], epsilon=1e-6, weight_decay=0.3)
    return build_optimizer(owned, numbers, sum_over_owners=lambda vector: vector, fused=fused)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("name", "documented"), [("adamw", FUSED_ADAM), ("lamb", FUSED_LAMB)])
def test_only_documented_arguments_are_given(name, documented):
    optimizer = built(name, owned_of(WHOLES))
    assert optimizer.given.keys() <= documented
    assert (optimizer.given["betas"], optimizer.given["eps"]) == (BETAS, 1e-6)
    assert optimizer.given["adam_w_mode"] is optimizer.given["bias_correction"] is True
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


@pytest.mark.usefixtures("stand_in")
def test_lamb_of_apex_neither_clips_nor_adapts_what_does_not_decay():
    """The gradients come clipped; its kernel divides by norm / limit where the norm is above the limit."""
    given = built("lamb", owned_of(WHOLES)).given
    assert given["max_grad_norm"] == math.inf
    assert given["use_nvlamb"] is False
    assert given["grad_averaging"] is True


@pytest.mark.usefixtures("stand_in")
def test_apex_counts_from_the_group_and_finds_its_moments_and_no_empty_tensor():
    """As its classes read them: ``group["step"]``, ``state[p]["exp_avg"]``, and a list without empty tensors."""
    owned = owned_of(WHOLES, owners=Axis("owners", tuple(range(4)), 3))
    optimizer = built("adamw", owned)
    assert any(each.weight.numel() == 0 for each in owned)
    for group in optimizer.param_groups:
        assert group["step"] == 0
        for weight in group["params"]:
            assert weight.numel()
            assert optimizer.state[weight].keys() >= {"exp_avg", "exp_avg_sq"}
    for each in owned:
        assert moment_of(optimizer, "exp_avg")(each).shape == each.part.local_shape


@pytest.mark.usefixtures("stand_in")
def test_layer_norm_is_called_with_a_shape_and_an_epsilon():
    assert apex.mixed_layer_norm()(8, eps=1e-12).normalized_shape == (8,)


@pytest.mark.parametrize("build", [lambda: built("adamw", owned_of(WHOLES)), apex.mixed_layer_norm])
def test_without_apex_the_way_out_is_told(monkeypatch, build):
    monkeypatch.setitem(sys.modules, "apex", None)
    for name in ("apex.optimizers", "apex.normalization"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ConfigError, match=r"run\.fused = apex needs NVIDIA's apex.*set run\.fused: torch"):
        build()


@pytest.fixture
def installed() -> None:
    pytest.importorskip("apex.optimizers", reason="NVIDIA's apex is not installed", exc_type=ImportError)
    if not torch.cuda.is_available():
        pytest.skip("apex needs a CUDA device")


def moved(name: str, fused: str) -> dict[str, torch.Tensor]:
    """Weights after three steps in float32 on the GPU."""
    owned = [
        Owned(each.part, each.weight.cuda(), each.gradient.cuda())
        for each in owned_of(WHOLES, dtype=torch.float32)
    ]
    optimizer = built(name, owned, fused)
    for step in range(3):
        for each in owned:
            each.gradient.copy_(gradients_of(step)[each.part.name])
        step_(optimizer, rate=0.05, weight_decay=0.3)
    return {each.part.name: each.weight.cpu() for each in owned}


@pytest.mark.apex
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_apex_moves_the_weights_as_torch_does(name):
    found, truth = moved(name, "apex"), moved(name, "torch")
    for key, weight in found.items():
        # Ten operations a step in float32, in another order.
        torch.testing.assert_close(weight, truth[key], rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.apex
@pytest.mark.usefixtures("installed")
def test_layer_norm_of_apex_is_that_of_torch():
    layer, other = apex.mixed_layer_norm()(16, eps=1e-12).cuda(), torch.nn.LayerNorm(16, eps=1e-12).cuda()
    hidden = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).cuda()
    torch.testing.assert_close(layer(hidden), other(hidden), rtol=1e-5, atol=1e-5)
