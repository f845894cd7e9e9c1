"""The part of a MegatronBert that one pipeline stage holds; a plan of all layers makes the whole model."""

from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from megatron_bert_tp.errors import LayoutError
from megatron_bert_tp.model.context import Context
from megatron_bert_tp.model.embeddings import Embeddings
from megatron_bert_tp.model.encoder import Encoder
from megatron_bert_tp.model.heads import LanguageHeads, Pooler, classify, wide_linear
from megatron_bert_tp.model.masks import self_attention_mask
from megatron_bert_tp.model.recompute import Recompute
from megatron_bert_tp.model.segments import Segments
from megatron_bert_tp.model.shape import PRETRAINING, Head, ModelShape, tied_names
from megatron_bert_tp.parallel.embedding import VocabParallelEmbedding
from megatron_bert_tp.parallel.gradients import TiedWeight
from megatron_bert_tp.parallel.linear import (
    ColumnParallelLinear,
    ParallelLinear,
    QueryKeyValueLinear,
    RowParallelLinear,
)
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.narrow import is_narrow
from megatron_bert_tp.parallel.random_bits import RandomBits
from megatron_bert_tp.parallel.sharding import Part, parts
from megatron_bert_tp.parallel.token_runs import TokenRuns
from megatron_bert_tp.parallel.triton_dropout import KernelBits, Kernels, TokenBits
from megatron_bert_tp.parallel.weight_gradients import WeightGradients
from megatron_bert_tp.pipeline.partition import StagePlan


class StageInput(Protocol):
    """What a stage reads from a microbatch (`data.batch.Batch` fits it)."""

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
        """``[samples]`` numbers from which dropout bits are drawn; a sample is a row unless rows are packed."""
    @property
    def packed_lengths(self) -> tuple[int, ...] | None:
        """``[samples]`` tokens of the samples one behind another in the only row; None where rows are samples."""
    @property
    def position_ids(self) -> Tensor | None:
        """``[1, sequence]`` int64 place of each token in its sample, for a packed row; else None."""


class MaskedInput(StageInput, Protocol):
    """What a language-model head reads besides."""

    @property
    def masked_positions(self) -> Tensor:
        """``[masked]`` int64, flat index into batch x sequence."""


@dataclass(frozen=True)
class PretrainingLogits:
    """What the last stage gives: ``masked`` ``[masked, share]`` of this rank, ``next_sentence`` ``[batch, 2]``."""

    masked: Tensor
    next_sentence: Tensor


Output = Tensor | PretrainingLogits
SplitsSequence = ColumnParallelLinear | QueryKeyValueLinear | RowParallelLinear | VocabParallelEmbedding
"""Layers that change between the tokens of a rank and all tokens."""


class Trunk(nn.Module):
    """What Hugging Face's prefix ``bert`` holds: embeddings, encoder, pooler, as plan and head have them."""

    def __init__(
        self,
        shape: ModelShape,
        plan: StagePlan,
        *,
        has_pooler: bool,
        axis: Axis,
        dtype: torch.dtype,
        recompute: Recompute | None = None,
    ) -> None:
        super().__init__()
        if plan.is_first:
            self.embeddings = Embeddings(shape, axis=axis, dtype=dtype)
        self.encoder = Encoder(shape, plan, axis=axis, dtype=dtype, recompute=recompute)
        if plan.is_last and has_pooler:
            self.pooler = Pooler(shape.hidden_size, dtype=dtype)


class MegatronBertStage(nn.Module):
    """One pipeline stage of any model of the family, which ``head`` decides.

    ``seed`` names the dropout bits; in evaluation mode there is no dropout.  Parameters start at zero
    (LayerNorms at one): call `model.initialisation.initialise_` or load weights.  With ``splits_sequence`` the
    tensor ranks share out the tokens between the sharded products (Korthikanti et al. 2022), and gradients of
    parts that are ``over_sequence`` are sums over the own tokens.  ``weight_gradients`` can put off those of the
    linear layers that are split over the axis.  With ``kernels`` ``"triton"`` dropout is computed by kernels that
    draw the same bits: `triton_dropout.kernels_for` says when.
    """

    def __init__(
        self,
        shape: ModelShape,
        plan: StagePlan,
        *,
        axis: Axis,
        head: Head = PRETRAINING,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        splits_sequence: bool = False,
        recompute: Recompute | None = None,
        kernels: Kernels = "torch",
    ) -> None:
        super().__init__()
        self.shape, self.plan, self.head, self.seed, self.dtype = shape, plan, head, seed, dtype
        self.kernels = kernels
        self.axis, self.splits_sequence = axis, splits_sequence and axis.size > 1
        self._check_cross_attention()
        self.bert = Trunk(
            shape, plan, has_pooler=head.has_pooler, axis=axis, dtype=dtype, recompute=recompute
        )
        if plan.is_last:
            self._add_head()
        self.weight_gradients = WeightGradients()
        self._set_up_layers()
        if plan.is_first and plan.is_last and tied_names(shape, head):
            # One storage, two leaves: the two gradients stay apart, as they do on two stages.
            self.cls.predictions.decoder.weight.data = self.bert.embeddings.word_embeddings.weight.data

    def _check_cross_attention(self) -> None:
        if not self.shape.add_cross_attention:
            return
        if not (self.plan.is_first and self.plan.is_last):
            raise LayoutError(
                "cross-attention reads the encoder's states in every layer, and a pipeline sends only the "
                "decoder's from stage to stage; use a pipeline size of 1, and more tensor ranks if memory is short"
            )
        if self.splits_sequence:
            raise LayoutError(
                "cross-attention reads the encoder's states whole, and sequence parallelism splits the tokens over"
                f" the tensor ranks ({self.axis.size}); turn it off, or use a model without add_cross_attention"
            )

    def _set_up_layers(self) -> None:
        for layer in self.modules():
            if isinstance(layer, ParallelLinear):
                layer.weight_gradients = self.weight_gradients
            if isinstance(layer, SplitsSequence):
                layer.splits_sequence = self.splits_sequence

    def _add_head(self) -> None:
        shape, head = self.shape, self.head
        if head.has_predictions or head.has_next_sentence:
            self.cls = LanguageHeads(shape, head, axis=self.axis, dtype=self.dtype)
        if head.linear:
            linear = nn.Linear(shape.hidden_size, head.rows(shape), dtype=self.dtype)
            self.add_module(head.linear, linear)

    def forward(self, received: Tensor | None, batch: StageInput) -> Output:
        """Hidden states of the shape `boundary_shape` from the stage before (None on the first) to the next's.

        The last stage gives what its head computes: `PretrainingLogits`; this rank's logits ``[masked, share]`` at
        the masked positions; ``[batch, classes]``; ``[batch, sequence, classes]``; or the hidden states.
        """
        bits = RandomBits(self.seed, batch.sample_numbers, batch.packed_lengths) if self.training else None
        context = self._context(batch, bits)
        if received is None:
            received = self._embedded(batch, context)
        hidden: Tensor = self.bert.encoder(received, context).hidden
        return self._output(hidden, batch, context, bits) if self.plan.is_last else hidden

    def _context(self, batch: StageInput, bits: RandomBits | None) -> Context:
        """What all layers read: masks, segments, dropout bits of the hidden states that this rank has."""
        num_samples, sequence = batch.input_ids.shape
        is_causal, like = self.shape.is_decoder, self._like(batch)
        mask = self_attention_mask(
            batch.attention_mask, queries=sequence, keys=sequence, is_causal=is_causal, like=like
        )
        lengths = batch.packed_lengths
        segments = None if lengths is None else Segments.of(lengths, is_causal=is_causal, like=like)
        tokens = TokenRuns(num_samples, sequence, self.axis) if self.splits_sequence else None
        if bits is not None and tokens is not None:
            bits = bits.of_run(tokens.own, sequence=sequence)
        kernel_bits = self._kernel_bits(bits, segments, like)
        return Context(mask=mask, bits=bits, segments=segments, tokens=tokens, kernel_bits=kernel_bits)

    def _kernel_bits(self, bits: RandomBits | None, segments: Segments | None, like: Tensor) -> KernelBits | None:
        if bits is None or self.kernels == "torch":
            return None
        groups = None if segments is None else [group.samples for group in segments.groups]
        return KernelBits.of(bits, like.shape[1], like.device, groups=groups)

    def _like(self, batch: StageInput) -> Tensor:
        """An empty tensor with the microbatch's rows and positions, and the model's number format and device."""
        return next(self.parameters()).new_empty((*batch.input_ids.shape, 0))

    def _embedded(self, batch: StageInput, context: Context) -> Tensor:
        given = batch.input_ids, batch.token_type_ids, context.hidden_bits
        embeddings: Embeddings = self.bert.embeddings
        if context.tokens is not None:
            return embeddings.of_run(*given, tokens=context.tokens, position_ids=batch.position_ids)
        embedded: Tensor = embeddings(*given, position_ids=batch.position_ids)
        return embedded

    def _output(self, hidden: Tensor, batch: StageInput, context: Context, bits: RandomBits | None) -> Output:
        head = self.head
        if not (head.has_predictions or head.has_next_sentence or (head.linear and head.has_pooler)):
            whole = context.whole(hidden)
            return self.logits_of_classes(whole, bits) if head.linear else whole
        positions = cast(MaskedInput, batch).masked_positions if head.has_predictions else None
        rows, samples = context.rows_of_heads(hidden, positions, has_samples=head.has_pooler)
        if head.linear:
            bits = None if bits is None else bits.of_samples()
            return self.logits_of_classes(self.bert.pooler(samples), bits)
        if not head.has_predictions:
            return self._next_sentence(samples)
        masked: Tensor = self.cls.predictions(rows)
        return PretrainingLogits(masked, self._next_sentence(samples)) if head.has_next_sentence else masked

    def _next_sentence(self, samples: Tensor) -> Tensor:
        logits: Tensor = self.cls.seq_relationship(self.bert.pooler(samples))
        return _widened(logits)

    def logits_of_classes(self, states: Tensor, bits: RandomBits | None) -> Tensor:
        """Dropout and the linear layer of the head on pooled ``[batch, hidden]`` or all positions' states.

        In float32 where the states are narrower.
        """
        assert self.head.linear is not None
        probability = self.shape.hidden_dropout_prob if self.head.has_dropout else 0.0
        own: RandomBits | TokenBits | None = bits
        if bits is not None and self.kernels == "triton":
            own = TokenBits.of(bits, states.shape[1] if states.dim() == 3 else 1, states.device)
        return classify(partial(wide_linear, self.get_submodule(self.head.linear)), states, own, probability)

    def boundary_shape(self, batch: StageInput) -> tuple[int, int, int]:
        """Shape of what one stage sends to the next for this microbatch.

        ``[batch, sequence, hidden]``; ``[1, tokens / size, hidden]``, rounded up, where the sequence is split.
        """
        num_samples, sequence = batch.input_ids.shape
        if self.splits_sequence:
            return 1, TokenRuns(num_samples, sequence, self.axis).length, self.shape.hidden_size
        return num_samples, sequence, self.shape.hidden_size

    def parts(self) -> list[Part]:
        """Every named rectangle of a tensor that this stage holds on this rank."""
        return parts(self, self.axis, tied_names(self.shape, self.head))

    def tied(self) -> TiedWeight | None:
        """The copies of the word embeddings here, or None when they are not tied or not on this stage."""
        if not tied_names(self.shape, self.head) or not (self.plan.is_first or self.plan.is_last):
            return None
        lookup = self.bert.embeddings.word_embeddings.weight if self.plan.is_first else None
        projection = self.cls.predictions.decoder.weight if self.plan.is_last else None
        return TiedWeight(lookup, projection)


def _widened(logits: Tensor) -> Tensor:
    """Logits of few classes in float32 where the model's format is narrower, for the loss."""
    return logits.float() if is_narrow(logits) else logits
