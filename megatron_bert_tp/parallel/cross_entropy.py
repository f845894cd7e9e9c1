"""Cross entropy over logits whose vocabulary is split over the tensor axis (Shoeybi et al. 2019, section 3)."""

from typing import Any

import torch
from torch import Tensor

from megatron_bert_tp.parallel.collectives import maximum_over_, sum_over_
from megatron_bert_tp.parallel.mesh import Axis

IGNORED = -100


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, num_classes: int, axis: Axis
    ) -> tuple[Tensor, Tensor]:
        share = logits.shape[-1]
        first = axis.rank * share
        here = max(0, min(share, num_classes - first))
        is_narrow = logits.dtype in (torch.float16, torch.bfloat16)
        shifted = logits.float() if is_narrow else logits.clone()
        shifted[:, here:] = -torch.inf
        maximum = maximum_over_(shifted.amax(-1), axis)
        shifted.sub_(maximum.unsqueeze(-1))
        rows = (labels - first).clamp(0, share - 1).unsqueeze(-1)
        is_here = (labels >= first) & (labels < first + here)
        target = shifted.gather(-1, rows).squeeze(-1).masked_fill(~is_here, 0)
        exponentials = shifted.exp_()
        sums = sum_over_(torch.stack([exponentials.sum(-1), target]), axis)
        is_counted = labels != IGNORED
        ctx.dtype = logits.dtype
        ctx.save_for_backward(exponentials.div_(sums[0].unsqueeze(-1)), rows, is_here, is_counted)
        is_right = (sums[1] >= 0) & is_counted
        ctx.mark_non_differentiable(is_right)
        return (sums[0].log() - sums[1]).masked_fill(~is_counted, 0), is_right

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, rows, is_here, is_counted = ctx.saved_tensors
        grad_loss = (grads[0] * is_counted).unsqueeze(-1)
        grad = softmax * grad_loss
        grad.scatter_add_(-1, rows, -grad_loss * is_here.unsqueeze(-1))
        return grad.to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, *, num_classes: int, axis: Axis
) -> tuple[Tensor, Tensor]:
    """Negative log likelihood of every position, and whether its label has the highest logit.

    ``logits`` ``[positions, share]`` are this rank's rows, ``labels`` ``[positions]`` whole-vocabulary ids.
    Rows from ``num_classes`` on are padding and have no part in the softmax; a label of -100 gives loss 0 and
    no gradient, so a batch without any label has loss 0 and not nan.  Messages: one maximum of
    ``[positions]`` and one sum of ``[2, positions]``.
    """
    result: tuple[Tensor, Tensor] = _VocabParallelCrossEntropy.apply(logits, labels, num_classes, axis)
    return result
