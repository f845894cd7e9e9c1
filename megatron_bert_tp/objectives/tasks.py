"""The losses of every head as sums over global counts, for training under any pipeline.

As in pretraining, the labels of the whole step are counted first, and each microbatch adds its share.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_bert_tp.model.shape import Head, ModelShape
from megatron_bert_tp.model.stage import PretrainingLogits
from megatron_bert_tp.objectives.label_losses import (
    LABEL_LOSSES,
    CrossEntropy,
    LabelLoss,
    VocabularyCrossEntropy,
    answer_labels,
)
from megatron_bert_tp.parallel.collectives import sum_over_
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


def terms_of(head: Head, shape: ModelShape, *, tensor: Axis, problem_type: str | None = None) -> tuple[Term, ...]:
    """Terms of the loss of a model with ``head``; ``problem_type`` is that of a sequence classifier.

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
        terms.append(Term(CrossEntropy(), lambda batch: batch.labels, _choice_logits))
    elif head.linear:
        loss = LABEL_LOSSES[problem_type] if problem_type else CrossEntropy()
        terms.append(Term(loss, lambda batch: batch.labels, lambda output, _: output))
    return tuple(terms)


def count_labels(
    terms: Sequence[Term], batches: Sequence[object], data: Axis, device: torch.device
) -> tuple[int, ...]:
    """Labels of each term in these microbatches on all ranks of ``data``: one all-reduce."""
    counts = [sum(int(term.loss.count(term.labels(batch))) for batch in batches) for term in terms]
    return tuple(sum_over_(torch.tensor(counts, device=device), data).tolist())


def task_loss(
    terms: Sequence[Term], output: object, batch: object, counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """This microbatch's share of the step's loss, and the summed loss of each term ``[terms]`` float64."""
    totals = [term.loss.total(term.logits(output, batch), term.labels(batch)) for term in terms]
    shares = [
        term.weight * total / max(1, count) for term, total, count in zip(terms, totals, counts, strict=True)
    ]
    return torch.stack(shares).sum(), torch.stack([total.detach().double() for total in totals])


def loss_of_step(terms: Sequence[Term], sums: Tensor, counts: Sequence[int]) -> float:
    """Loss of a whole step from the summed statistics ``[terms]``."""
    weights = [term.weight / max(1, count) for term, count in zip(terms, counts, strict=True)]
    return float(sum(weight * total for weight, total in zip(weights, sums.tolist(), strict=True)))


def _answer_terms() -> tuple[Term, ...]:
    """Start and end of the answer, each with half the weight."""

    def term(index: int, name: str) -> Term:
        return Term(
            CrossEntropy(),
            lambda batch: answer_labels(getattr(batch, name), batch.input_ids.shape[1]),
            lambda output, _: output[..., index],
            weight=0.5,
        )

    return term(0, "start_positions"), term(1, "end_positions")


def _masked_logits(output: Tensor | PretrainingLogits, _batch: object) -> Tensor:
    return output.masked if isinstance(output, PretrainingLogits) else output


def _pair_logits(output: Tensor | PretrainingLogits, _batch: object) -> Tensor:
    return output.next_sentence if isinstance(output, PretrainingLogits) else output


def _choice_logits(output: Tensor, batch: Any) -> Tensor:
    """``[batch x choices, 1]`` to ``[batch, choices]``."""
    return output.view(batch.labels.shape[0], -1)
