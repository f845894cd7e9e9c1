"""The part of a MegatronBert that one pipeline stage holds; a plan of all layers makes the whole model."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron_bert_tp.model.attention import padding_of
from megatron_bert_tp.model.embeddings import Embeddings
from megatron_bert_tp.model.heads import Pooler, PretrainingHeads
from megatron_bert_tp.model.layer import Layer
from megatron_bert_tp.model.shape import ModelShape, tied_names
from megatron_bert_tp.parallel.gradients import TiedWeight
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.random_bits import RandomBits
from megatron_bert_tp.parallel.sharding import Part, parts
from megatron_bert_tp.pipeline.partition import StagePlan


class StageInput(Protocol):
    """What a stage reads from a microbatch (`data.batches.Batch` fits it)."""

    @property
    def input_ids(self) -> Tensor:
        """``[batch, sequence]`` int64."""
    @property
    def token_type_ids(self) -> Tensor:
        """``[batch, sequence]`` int64."""
    @property
    def attention_mask(self) -> Tensor | None:
        """``[batch, sequence]`` bool, True at real tokens; None without padding."""
    @property
    def sample_numbers(self) -> tuple[int, ...]:
        """``[batch]`` numbers from which dropout bits are drawn."""
    @property
    def masked_positions(self) -> Tensor:
        """``[masked]`` int64, flat index into batch x sequence."""


@dataclass(frozen=True)
class PretrainingLogits:
    """What the last stage gives: ``masked`` ``[masked, share]`` of this rank, ``next_sentence`` ``[batch, 2]``."""

    masked: Tensor
    next_sentence: Tensor


class Encoder(nn.Module):
    """The layers of one stage under their global numbers, and the final LayerNorm on the last."""

    def __init__(self, shape: ModelShape, plan: StagePlan, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        self.is_last = plan.is_last
        self.layer = nn.ModuleDict(
            {str(number): Layer(shape, number, axis=axis, dtype=dtype) for number in plan.layers}
        )
        if plan.is_last:
            self.ln = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps, dtype=dtype)

    def forward(self, hidden: Tensor, padding: Tensor | None, bits: RandomBits | None) -> Tensor:
        """``[batch, sequence, hidden]`` to the same shape."""
        for layer in self.layer.values():
            hidden = layer(hidden, padding, bits)
        return self.ln(hidden) if self.is_last else hidden


class Trunk(nn.Module):
    """What Hugging Face's prefix ``bert`` holds: embeddings, encoder, pooler, as far as the plan has them."""

    def __init__(self, shape: ModelShape, plan: StagePlan, *, axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        if plan.is_first:
            self.embeddings = Embeddings(shape, axis=axis, dtype=dtype)
        self.encoder = Encoder(shape, plan, axis=axis, dtype=dtype)
        if plan.is_last:
            self.pooler = Pooler(shape.hidden_size, dtype=dtype)


class MegatronBertStage(nn.Module):
    """One pipeline stage of a `MegatronBertForPreTraining`.

    ``seed`` names the dropout bits; in evaluation mode there is no dropout.  Parameters start at zero
    (LayerNorms at one): call `model.initialisation.initialise_` or load weights.
    """

    def __init__(
        self,
        shape: ModelShape,
        plan: StagePlan,
        *,
        axis: Axis,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.shape, self.plan, self.seed, self.dtype = shape, plan, seed, dtype
        self.axis = axis
        self.bert = Trunk(shape, plan, axis=axis, dtype=dtype)
        if plan.is_last:
            self.cls = PretrainingHeads(shape, axis=axis, dtype=dtype)
        if plan.is_first and plan.is_last and shape.tie_word_embeddings:
            # One storage, two leaves: the two gradients stay apart, as they do on two stages.
            self.cls.predictions.decoder.weight.data = self.bert.embeddings.word_embeddings.weight.data

    def forward(self, received: Tensor | None, batch: StageInput) -> Tensor | PretrainingLogits:
        """Hidden states ``[batch, sequence, hidden]`` from the stage before (None on the first) to the next's.

        The last stage gives `PretrainingLogits`, at the masked positions only.
        """
        bits = RandomBits(self.seed, batch.sample_numbers) if self.training else None
        padding = padding_of(batch.attention_mask, self.dtype)
        if received is None:
            received = self.bert.embeddings(batch.input_ids, batch.token_type_ids, bits)
        hidden = self.bert.encoder(received, padding, bits)
        return self._logits(hidden, batch) if self.plan.is_last else hidden

    def _logits(self, hidden: Tensor, batch: StageInput) -> PretrainingLogits:
        rows = hidden.flatten(0, 1).index_select(0, batch.masked_positions)
        masked = self.cls.predictions(rows)
        return PretrainingLogits(masked, self.cls.seq_relationship(self.bert.pooler(hidden)))

    def boundary_shape(self, batch: StageInput) -> tuple[int, int, int]:
        """Shape ``[batch, sequence, hidden]`` of what one stage sends to the next for this microbatch."""
        num_samples, sequence = batch.input_ids.shape
        return num_samples, sequence, self.shape.hidden_size

    def parts(self) -> list[Part]:
        """Every named rectangle of a tensor that this stage holds on this rank."""
        return parts(self, self.axis, tied_names(self.shape))

    def tied(self) -> TiedWeight | None:
        """The copies of the word embeddings here, or None when they are not tied or not on this stage."""
        if not self.shape.tie_word_embeddings or not (self.plan.is_first or self.plan.is_last):
            return None
        lookup = self.bert.embeddings.word_embeddings.weight if self.plan.is_first else None
        projection = self.cls.predictions.decoder.weight if self.plan.is_last else None
        return TiedWeight(lookup, projection)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that an optimizer moves, by name; a tied copy that shares its storage is left out."""
        named = dict(self.named_parameters())
        if self.plan.is_first and self.plan.is_last:
            return {name: value for name, value in named.items() if name not in tied_names(self.shape)}
        return named
