"""Every update rule: rectangles against torch on whole tensors, moments as named tensors, going on."""

import pytest
import torch
from torch import Tensor

from megatron_bert_tp.optim.roles import is_decayed
from megatron_bert_tp.optim.rules import OptimizerNumbers, kinds_of, moment_of, restart_, step_
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.ownership import Owned
from tests.comparison import join
from tests.optim.rectangles import (
    WHOLES,
    Whole,
    assert_near,
    built,
    gradients_of,
    owned_of,
    part_of,
    pieces,
    walk,
    weights_at_start,
)

BETAS, EPSILON, MOMENTUM = (0.8, 0.95), 1e-6, 0.7
RATES, DECAYS = [0.1, 0.02, 0.3], [0.3, 0.1, 0.2]
RULES = ("adamw", "lamb", "sgd")
# Some ten operations an element and three steps, each rounded by 1e-16 relative.
TOLERANCE = 1e-14


def numbers_of(name: str) -> OptimizerNumbers:
    return OptimizerNumbers(name=name, beta1=BETAS[0], beta2=BETAS[1], epsilon=EPSILON, momentum=MOMENTUM)


def by_torch(name: str) -> dict[str, Tensor]:
    """Three steps of torch's own loops (not fused) on whole tensors."""
    weights = {name: weight.requires_grad_() for name, weight in weights_at_start().items()}
    groups = [{"params": [weight], "name": key} for key, weight in weights.items()]
    optimizer = (
        torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON, foreach=False, fused=False)
        if name == "adamw"
        else torch.optim.SGD(groups, momentum=MOMENTUM, foreach=False, fused=False)
    )
    for step, (rate, decay) in enumerate(zip(RATES, DECAYS, strict=True)):
        gradients = gradients_of(step)
        for group in optimizer.param_groups:
            key = group["name"]
            group["lr"], group["weight_decay"] = rate, decay if is_decayed(key) else 0.0
            weights[key].grad = gradients[key]
        optimizer.step()
    return {key: weight.detach() for key, weight in weights.items()}


@pytest.mark.parametrize("num_owners", [1, 2, 5])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_rows_of_all_owners_are_torchs_on_whole_tensors(name, num_owners):
    found = []
    for rank in range(num_owners):
        owned = owned_of(WHOLES, owners=Axis("owners", tuple(range(num_owners)), rank))
        walk(owned, built(owned, numbers_of(name)), RATES, decays=DECAYS)
        found += pieces(owned)
    assert_near(join(found), by_torch(name), TOLERANCE)


def test_sgd_is_the_formula_of_its_document():
    """d = g + decay x w;  b = momentum x b + d;  w -= rate x b, for one number."""
    weight = torch.tensor([2.0], dtype=torch.float64)
    owned = Owned(part_of(Whole("a.weight", (1,))), weight, torch.zeros_like(weight))
    optimizer = built([owned], numbers_of("sgd"))
    owned.gradient.fill_(1.0)
    step_(optimizer, rate=0.1, weight_decay=0.5)
    assert moment_of(optimizer, "momentum_buffer")(owned).item() == pytest.approx(2.0, rel=1e-15)
    assert weight.item() == pytest.approx(1.8, rel=1e-15)
    step_(optimizer, rate=0.1, weight_decay=0.5)
    assert moment_of(optimizer, "momentum_buffer")(owned).item() == pytest.approx(3.3, rel=1e-15)
    assert weight.item() == pytest.approx(1.47, rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RULES)
def test_an_optimizer_that_starts_again_goes_on_bit_for_bit(name, dtype):
    owned = owned_of(WHOLES, dtype=dtype)
    first = built(owned, numbers_of(name))
    walk(owned, first, RATES[:2], decays=DECAYS[:2])
    copies = [Owned(each.part, each.weight.clone(), torch.zeros_like(each.weight)) for each in owned]
    again = built(copies, numbers_of(name))
    restart_(again, 2)
    for copy, each in zip(copies, owned, strict=True):
        for kind in kinds_of(name):
            assert not moment_of(again, kind)(copy).any()
            moment_of(again, kind)(copy).copy_(moment_of(first, kind)(each))
    for rectangles, optimizer in ((owned, first), (copies, again)):
        walk(rectangles, optimizer, RATES[2:], decays=DECAYS[2:], first=2)
    for copy, each in zip(copies, owned, strict=True):
        assert torch.equal(copy.weight, each.weight), each.part.name


@pytest.mark.parametrize("name", RULES)
def test_moments_are_there_before_the_first_step_also_of_no_rows(name):
    owned = owned_of(WHOLES, owners=Axis("owners", tuple(range(8)), 7))
    optimizer = built(owned, numbers_of(name))
    assert any(each.weight.numel() == 0 for each in owned)
    for kind in kinds_of(name):
        for each in owned:
            moment = moment_of(optimizer, kind)(each)
            assert moment.shape == each.weight.shape == each.part.local_shape
            assert not moment.any()


@pytest.mark.parametrize("name", RULES)
def test_a_rank_that_owns_no_row_takes_its_step(name):
    owned = owned_of([Whole("pooler.dense.weight", (7, 3))], owners=Axis("owners", tuple(range(8)), 7))
    walk(owned, built(owned, numbers_of(name)), RATES, decays=DECAYS)
    assert [each.weight.numel() for each in owned] == [0]


@pytest.mark.parametrize("name", RULES)
def test_a_step_writes_the_weights_where_they_are_and_leaves_the_gradients(name):
    parameter = torch.ones(6, 2)
    part = part_of(Whole("a.weight", (2, 2)))
    owned = Owned(part, parameter[2:4], torch.full((2, 2), 0.5))
    step_(built([owned], numbers_of(name)), rate=0.1, weight_decay=0.0)
    assert (parameter[2:4] < 1).all()
    assert (parameter[[0, 1, 4, 5]] == 1).all()
    assert (owned.gradient == 0.5).all()
