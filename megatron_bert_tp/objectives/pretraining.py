"""Masked language model plus next sentence prediction (Devlin et al. 2019), as sums over global counts.

A mean of per-microbatch means would make the loss depend on how a batch was cut; so the number of masked
tokens and pairs of the whole step is counted first (labels are data) and every microbatch adds its share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bert_tp.model.stage import PretrainingLogits
from megatron_bert_tp.parallel.collectives import sum_over_
from megatron_bert_tp.parallel.cross_entropy import IGNORED, vocab_parallel_cross_entropy
from megatron_bert_tp.parallel.mesh import Axis


class Labels(Protocol):
    """What the objective reads from a microbatch (`data.batch.Batch` fits it)."""

    @property
    def masked_labels(self) -> Tensor:
        """``[masked]`` int64, -100 where there is none."""
    @property
    def next_sentence_labels(self) -> Tensor:
        """``[batch]`` int64: 0 when B follows A, 1 when it is random, -100 when there is none."""


@dataclass(frozen=True)
class Counts:
    """Labels of a whole step, over all microbatches and data ranks."""

    masked: int
    pairs: int


@dataclass(frozen=True)
class Losses:
    """Means over a whole step; a loss without any label is 0."""

    mlm_loss: float
    mlm_accuracy: float
    nsp_loss: float
    nsp_accuracy: float

    @property
    def loss(self) -> float:
        """What is minimised: the plain sum of both."""
        return self.mlm_loss + self.nsp_loss


def count(batches: Sequence[Labels], data: Axis, device: torch.device) -> Counts:
    """Number of labels in these microbatches on all ranks of ``data``: one all-reduce of two numbers."""
    masked = sum(int((batch.masked_labels != IGNORED).sum()) for batch in batches)
    pairs = sum(int((batch.next_sentence_labels != IGNORED).sum()) for batch in batches)
    totals = sum_over_(torch.tensor([masked, pairs], device=device), data).tolist()
    return Counts(masked=totals[0], pairs=totals[1])


def microbatch_loss(
    output: PretrainingLogits, batch: Labels, counts: Counts, *, num_classes: int, tensor: Axis
) -> tuple[Tensor, Tensor]:
    """This microbatch's share of the step's loss, and its statistics.

    Statistics ``[4]`` float64: sum of MLM losses, right MLM predictions, sum of NSP losses, right ones.
    """
    losses, is_right = vocab_parallel_cross_entropy(
        output.masked, batch.masked_labels, num_classes=num_classes, axis=tensor
    )
    pair_losses = F.cross_entropy(
        output.next_sentence, batch.next_sentence_labels, ignore_index=IGNORED, reduction="none"
    )
    is_right_pair = output.next_sentence.argmax(-1) == batch.next_sentence_labels
    masked_sum, pair_sum = losses.sum(), pair_losses.sum()
    loss = masked_sum / max(1, counts.masked) + pair_sum / max(1, counts.pairs)
    sums = (masked_sum.detach(), is_right.sum(), pair_sum.detach(), is_right_pair.sum())
    return loss, torch.stack([value.to(torch.float64) for value in sums])


def losses_of_step(statistics: Tensor, counts: Counts) -> Losses:
    """Means from the summed statistics ``[4]`` of a step."""
    mlm, mlm_right, nsp, nsp_right = statistics.tolist()
    masked, pairs = max(1, counts.masked), max(1, counts.pairs)
    return Losses(mlm / masked, mlm_right / masked, nsp / pairs, nsp_right / pairs)


@dataclass(frozen=True)
class PretrainingObjective:
    """What a step of pretraining minimises, for a vocabulary of ``num_classes`` words split over ``tensor``."""

    num_classes: int
    tensor: Axis
    num_statistics: ClassVar[int] = 4

    def count(self, batches: Sequence[Labels], data: Axis, device: torch.device) -> Counts:
        """Labels of a step, over all data ranks."""
        return count(batches, data, device)

    def share(self, output: PretrainingLogits, batch: Labels, counts: Counts) -> tuple[Tensor, Tensor]:
        """This microbatch's share of the loss, and its statistics."""
        return microbatch_loss(output, batch, counts, num_classes=self.num_classes, tensor=self.tensor)

    def losses(self, statistics: Tensor, counts: Counts) -> Losses:
        """Losses of the step from the statistics of all its microbatches."""
        return losses_of_step(statistics, counts)
