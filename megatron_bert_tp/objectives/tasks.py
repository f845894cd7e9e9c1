"""The losses of every head as sums over global counts, for training under any pipeline.

As in pretraining, the labels of the whole step are counted first, and each microbatch adds its share.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_bert_tp.model.shape import Head, ModelShape
from megatron_bert_tp.model.stage import PretrainingLogits
from megatron_bert_tp.objectives.label_losses import (
    LABEL_LOSSES,
    CrossEntropy,
    LabelLoss,
    VocabularyCrossEntropy,
)
from megatron_bert_tp.parallel.collectives import sum_over_
from megatron_bert_tp.parallel.cross_entropy import IGNORED
from megatron_bert_tp.parallel.mesh import Axis


@dataclass(frozen=True)
class Term:
    """One addend of a loss: where its labels and logits are, and how they are compared.

    ``labels`` reads a microbatch, ``logits`` the last stage's output and the microbatch.
    """

    loss: LabelLoss
    labels: Callable[[Any], Tensor]
    logits: Callable[[Any, Any], Tensor]
    weight: float = 1.0


def terms_of(
    head: Head,
    shape: ModelShape,
    *,
    tensor: Axis,
    problem_type: str | None = None,
    classes: CrossEntropy | None = None,
) -> tuple[Term, ...]:
    """Terms of the loss of a model with ``head``; ``problem_type`` is that of a sequence classifier.

    ``classes`` says how classes are compared, where that is not the plain cross entropy.

    Microbatches carry, as the head needs them, ``masked_labels`` of the ``masked_positions`` of a language model,
    ``next_sentence_labels``, ``labels``, or ``start_positions`` and ``end_positions``.
    """
    if head.linear == "qa_outputs":
        return _answer_terms()
    terms = []
    if head.has_predictions:
        words = VocabularyCrossEntropy(shape.vocab_size, tensor)
        terms.append(Term(words, lambda batch: batch.masked_labels, _masked_logits))
    if head.has_next_sentence:
        terms.append(Term(CrossEntropy(), lambda batch: batch.next_sentence_labels, _pair_logits))
    if head.num_outputs == 1:
        terms.append(Term(classes or CrossEntropy(), lambda batch: batch.labels, _choice_logits))
    elif head.linear:
        loss = LABEL_LOSSES[problem_type] if problem_type else CrossEntropy()
        chosen = classes if classes is not None and isinstance(loss, CrossEntropy) else loss
        terms.append(Term(chosen, lambda batch: batch.labels, _labelled_logits))
    return tuple(terms)


def count_labels(
    terms: Sequence[Term], batches: Sequence[object], data: Axis, device: torch.device
) -> tuple[float, ...]:
    """Labels of each term, by their weights, in these microbatches on all ranks of ``data``: one all-reduce."""
    counts = [sum(float(term.loss.count(term.labels(batch))) for batch in batches) for term in terms]
    return tuple(sum_over_(torch.tensor(counts, dtype=torch.float64, device=device), data).tolist())


def task_loss(
    terms: Sequence[Term], output: object, batch: object, counts: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """This microbatch's share of the step's loss, and the summed loss of each term ``[terms]`` float64."""
    totals = [term.loss.total(term.logits(output, batch), term.labels(batch)) for term in terms]
    shares = [
        term.weight * total / (count or 1) for term, total, count in zip(terms, totals, counts, strict=True)
    ]
    return torch.stack(shares).sum(), torch.stack([total.detach().double() for total in totals])


def loss_of_step(terms: Sequence[Term], sums: Tensor, counts: Sequence[float]) -> float:
    """Loss of a whole step from the summed statistics ``[terms]``."""
    weights = [term.weight / (count or 1) for term, count in zip(terms, counts, strict=True)]
    return float(sum(weight * total for weight, total in zip(weights, sums.tolist(), strict=True)))


@dataclass(frozen=True)
class TaskLosses:
    """The loss of a step, a mean over its labels."""

    loss: float


@dataclass(frozen=True)
class TaskObjective:
    """What a step of a task minimises: the terms of `terms_of`."""

    terms: tuple[Term, ...]

    @property
    def num_statistics(self) -> int:
        """Numbers that a microbatch reports: the summed loss of each term."""
        return len(self.terms)

    def count(self, batches: Sequence[Any], data: Axis, device: torch.device) -> tuple[float, ...]:
        """Labels of a step, over all data ranks."""
        return count_labels(self.terms, batches, data, device)

    def share(self, output: Any, batch: Any, counts: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """This microbatch's share of the loss, and its statistics."""
        return task_loss(self.terms, output, batch, counts)

    def losses(self, statistics: Tensor, counts: tuple[float, ...]) -> TaskLosses:
        """Loss of the step from the statistics of all its microbatches."""
        return TaskLosses(loss_of_step(self.terms, statistics, counts))


def _answer_terms() -> tuple[Term, ...]:
    """Start and end of the answer, each with half the weight."""

    def term(index: int, name: str) -> Term:
        return Term(
            CrossEntropy(),
            lambda batch: _places(getattr(batch, name), batch),
            lambda output, batch: _by_sample(output[..., index], batch),
            weight=0.5,
        )

    return term(0, "start_positions"), term(1, "end_positions")


def _places(positions: Tensor, batch: Any) -> Tensor:
    """Labels ``[samples]`` from places; those behind the end of a sample are ignored, as -100 is."""
    if batch.packed_lengths is not None:
        lengths = positions.new_tensor(batch.packed_lengths)
    elif batch.attention_mask is not None:
        lengths = batch.attention_mask.sum(1)
    else:
        lengths = positions.new_tensor(batch.input_ids.shape[1])
    is_ignored = (positions == IGNORED) | (positions >= lengths)
    return positions.clamp(min=0).masked_fill(is_ignored, IGNORED)


def _by_sample(logits: Tensor, batch: Any) -> Tensor:
    """Logits of tokens as ``[samples, longest]``, those of padding at minus infinity.

    `transformers` lets padding take part in the softmax; then the loss would depend on how a batch is padded.
    """
    if batch.packed_lengths is not None:
        rows = logits[0, : sum(batch.packed_lengths)].split(list(batch.packed_lengths))
        return pad_sequence(list(rows), batch_first=True, padding_value=-torch.inf)
    if batch.attention_mask is None:
        return logits
    return logits.masked_fill(~batch.attention_mask.bool(), -torch.inf)


def _labelled_logits(output: Tensor, batch: Any) -> Tensor:
    """A microbatch without samples has a row to compute and none to compare."""
    return output[: len(batch.labels)]


def _masked_logits(output: Tensor | PretrainingLogits, _batch: object) -> Tensor:
    return output.masked if isinstance(output, PretrainingLogits) else output


def _pair_logits(output: Tensor | PretrainingLogits, _batch: object) -> Tensor:
    return output.next_sentence if isinstance(output, PretrainingLogits) else output


def _choice_logits(output: Tensor, batch: Any) -> Tensor:
    """``[batch x choices, 1]`` to ``[batch, choices]``."""
    return output.view(batch.labels.shape[0], -1)
