"""From hidden states to logits and losses, for the heads that several classes share."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bert_tp.errors import ArgumentError
from megatron_bert_tp.model.heads import MaskedLanguageModelHead
from megatron_bert_tp.objectives.label_losses import VocabularyCrossEntropy, mean_loss
from megatron_bert_tp.parallel.collectives import gather_from
from megatron_bert_tp.parallel.cross_entropy import IGNORED


def words_loss(head: MaskedLanguageModelHead, logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Mean loss of this rank's ``logits`` ``[..., share]`` over the labels that are not -100."""
    if labels is None:
        return None
    if labels.shape != logits.shape[:-1]:
        raise ArgumentError(f"labels have the shape {tuple(labels.shape)}; it must be {tuple(logits.shape[:-1])}")
    return mean_loss(VocabularyCrossEntropy(head.full_shapes["bias"][0], head.axis), logits, labels)


def whole_vocabulary(head: MaskedLanguageModelHead, logits: Tensor) -> Tensor:
    """Logits of all words ``[..., vocabulary]`` from the shares of all ranks, padding cut off."""
    return gather_from(logits, head.axis)[..., : head.full_shapes["bias"][0]]


def labels_of_next_words(labels: Tensor) -> Tensor:
    """Label of each position: the word after it; the last one has none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def kept_positions(hidden: Tensor, kept: int | Tensor) -> Tensor:
    """Hidden states of the last ``kept`` positions (0: of all), or of the positions ``[kept]`` int64."""
    if isinstance(kept, torch.Tensor):
        return hidden[:, kept]
    return hidden[:, -kept:] if kept else hidden
