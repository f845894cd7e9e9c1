"""Losses of labels as a sum and a count, so that a mean can be taken over any set of microbatches.

A label of -100 is ignored, and a batch without any label has loss 0.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bert_tp.errors import ArgumentError
from megatron_bert_tp.parallel.cross_entropy import IGNORED, vocab_parallel_cross_entropy
from megatron_bert_tp.parallel.mesh import Axis


class LabelLoss(Protocol):
    """One way to compare logits with labels."""

    def count(self, labels: Tensor) -> Tensor:
        """How many labels count: a scalar, known before any logits are."""

    def total(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum of the losses of all labels that count: a scalar."""


@dataclass(frozen=True)
class CrossEntropy:
    """One class of several: logits ``[..., classes]``, labels ``[...]`` int64.

    ``smoothing`` spreads that share of each label evenly over all classes (Szegedy et al. 2016, section 7).  With
    ``weights``, one for each class, a label counts as much as its class weighs.
    """

    smoothing: float = 0.0
    weights: tuple[float, ...] | None = None

    def count(self, labels: Tensor) -> Tensor:
        """Labels that are not -100, or the sum of their weights (float64)."""
        is_label = labels != IGNORED
        if self.weights is None:
            return is_label.sum()
        check_classes(labels, len(self.weights))
        weights = torch.tensor(self.weights, dtype=torch.float64, device=labels.device)
        return weights[labels[is_label]].sum()

    def total(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum of negative log likelihoods; ArgumentError for a label that is none of the classes."""
        rows = logits.flatten(0, -2)
        if labels.numel() != rows.shape[0]:
            raise ArgumentError(
                f"labels have the shape {tuple(labels.shape)}; it must be {tuple(logits.shape[:-1])}, a class each"
            )
        check_classes(labels, logits.shape[-1])
        return F.cross_entropy(
            rows,
            labels.flatten(),
            weight=None if self.weights is None else rows.new_tensor(self.weights),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self.smoothing,
        )


class SquaredError:
    """Regression: logits and labels of the same number of values."""

    def count(self, labels: Tensor) -> Tensor:
        """All values."""
        return torch.tensor(labels.numel(), device=labels.device)

    def total(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum of squared differences; ArgumentError when there is not one label for each value."""
        _check_values(logits, labels)
        return F.mse_loss(logits.flatten(), labels.flatten().to(logits.dtype), reduction="sum")


class BinaryCrossEntropy:
    """Several classes that each hold or not: logits and labels ``[batch, classes]``."""

    def count(self, labels: Tensor) -> Tensor:
        """All values."""
        return torch.tensor(labels.numel(), device=labels.device)

    def total(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum over batch and classes; ArgumentError when there is not one label for each value."""
        _check_values(logits, labels)
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")


@dataclass(frozen=True)
class VocabularyCrossEntropy:
    """Words of a vocabulary that is split over ``axis``: this rank's logits ``[..., share]``."""

    num_classes: int
    axis: Axis

    def count(self, labels: Tensor) -> Tensor:
        """Labels that are not -100."""
        return (labels != IGNORED).sum()

    def total(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum of negative log likelihoods, equal on all ranks; ArgumentError for a label that is no word."""
        check_classes(labels, self.num_classes)
        rows = logits.flatten(0, -2)
        losses, _ = vocab_parallel_cross_entropy(
            rows, labels.flatten(), num_classes=self.num_classes, axis=self.axis
        )
        return losses.sum()


def check_classes(labels: Tensor, num_classes: int) -> None:
    """ArgumentError for a label outside the classes; split over ranks nobody would own it.

    A GPU is not waited for.
    """
    if labels.device.type != "cpu" or not labels.numel():
        return
    is_wrong = (labels != IGNORED) & ((labels < 0) | (labels >= num_classes))
    if is_wrong.any():
        raise ArgumentError(
            f"labels hold {int(labels[is_wrong][0])}; a label is from 0 to {num_classes - 1}, or {IGNORED} where "
            "there is none"
        )


def _check_values(logits: Tensor, labels: Tensor) -> None:
    if labels.numel() != logits.numel() or labels.shape[0] != logits.shape[0]:
        raise ArgumentError(
            f"labels have the shape {tuple(labels.shape)}; it must be {tuple(logits.shape)}, one number a logit"
        )


def mean_loss(loss: LabelLoss, logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that count; 0, with gradients of 0, when there are none."""
    return loss.total(logits, labels) / loss.count(labels).clamp(min=1)


def answer_labels(positions: Tensor, length: int) -> Tensor:
    """Labels ``[batch]`` from positions ``[batch]`` or ``[batch, 1]``: those beyond the sequence are ignored.

    Negative positions count as 0, as they do in `transformers`.
    """
    positions = positions.squeeze(-1) if positions.dim() > 1 else positions
    return positions.clamp(0, length).masked_fill(positions >= length, IGNORED)


LABEL_LOSSES: dict[str, LabelLoss] = {
    "regression": SquaredError(),
    "single_label_classification": CrossEntropy(),
    "multi_label_classification": BinaryCrossEntropy(),
}
"""By `problem_type`, Hugging Face's name of what a sequence classifier learns."""


def problem_type_of(labels: Tensor, num_labels: int) -> str:
    """What is learned, judged by the labels: one output is a regression, integers are classes, else many hold."""
    if num_labels == 1:
        return "regression"
    is_class = labels.dtype in (torch.long, torch.int)
    return "single_label_classification" if is_class else "multi_label_classification"
