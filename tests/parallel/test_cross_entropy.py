"""Vocab-parallel cross entropy against `torch.nn.functional.cross_entropy` on whole logits, float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bert_tp.parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.sharding import padded_share
from tests.support import IGNORED, Layout, build_mesh

VOCABULARY = 1003
# Sums of 1003 exponentials below 1 in another order: some 1e-14 of a loss near 10.
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def draw_logits(num_classes: int, num_rows: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return scale * torch.randn(num_rows, num_classes, dtype=torch.float64, generator=generator)


def draw_labels(logits: Tensor) -> Tensor:
    """Random labels; some rows hit the largest logit, some are ignored, one is the last class."""
    labels = torch.randint(logits.shape[1], logits.shape[:1], generator=torch.Generator().manual_seed(2))
    labels[::3] = logits.argmax(-1)[::3]
    labels[1::4] = IGNORED
    labels[2] = logits.shape[1] - 1
    return labels


def upstream(num_rows: int) -> Tensor:
    return torch.linspace(-1, 2, num_rows, dtype=torch.float64)


def run_sharded(logits: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, hits and this rank's gradient; the padding rows hold huge logits that nothing may read."""
    axis = build_mesh(Layout(tensor=size)).tensor
    num_classes = logits.shape[1]
    share = padded_share(num_classes, axis)
    padded = F.pad(logits, (0, share * size - num_classes), value=1e30)
    own = padded[:, axis.rank * share : (axis.rank + 1) * share].clone().requires_grad_()
    losses, is_right = vocab_parallel_cross_entropy(own, labels, num_classes=num_classes, axis=axis)
    losses.backward(upstream(len(labels)))
    return losses.detach(), is_right, own.grad


def check(ranks, size: int, logits: Tensor, labels: Tensor) -> None:
    answers = ranks.run(size, run_sharded, logits, labels, size)
    whole = logits.clone().requires_grad_()
    truth = F.cross_entropy(whole, labels, ignore_index=IGNORED, reduction="none")
    truth.backward(upstream(len(labels)))
    grad = torch.cat([grad for _, _, grad in answers], -1)
    num_classes = logits.shape[1]
    torch.testing.assert_close(grad[:, :num_classes], whole.grad, **EXACT)
    assert not grad[:, num_classes:].any(), "padding rows have a gradient"
    for losses, is_right, _ in answers:
        torch.testing.assert_close(losses, truth.detach(), **EXACT)
        assert torch.equal(losses, answers[0][0]), "ranks differ"
        assert torch.equal(is_right, logits.argmax(-1) == labels)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_loss_gradient_and_hits_equal_the_dense_cross_entropy(ranks, size):
    logits = draw_logits(VOCABULARY, 24, scale=3)
    check(ranks, size, logits, draw_labels(logits))


@pytest.mark.parametrize("size", [1, 4])
def test_huge_logits_do_not_overflow(ranks, size):
    logits = draw_logits(VOCABULARY, 12, scale=1e4)
    check(ranks, size, logits, draw_labels(logits))


def test_ranks_that_hold_only_padding_take_part(ranks):
    """5 classes on 4 ranks: shares of 8, so three ranks hold no class at all."""
    logits = draw_logits(5, 12, scale=3)
    check(ranks, 4, logits, draw_labels(logits))


@pytest.mark.parametrize("size", [1, 2])
def test_without_any_label_loss_and_gradient_are_zero(ranks, size):
    logits = draw_logits(VOCABULARY, 6, scale=3)
    for losses, is_right, grad in ranks.run(size, run_sharded, logits, torch.full((6,), IGNORED), size):
        assert torch.equal(losses, torch.zeros(6, dtype=torch.float64))
        assert torch.equal(grad, torch.zeros_like(grad))
        assert not is_right.any()


def test_gradient_passes_gradcheck_in_one_process():
    logits = draw_logits(7, 5, scale=1).requires_grad_()
    labels = torch.tensor([0, 6, IGNORED, 3, 3])
    alone = Axis.alone("tensor")
    assert torch.autograd.gradcheck(
        lambda x: vocab_parallel_cross_entropy(x, labels, num_classes=6 + 1, axis=alone)[0], logits
    )
