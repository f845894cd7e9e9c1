"""What goes through all layers of one forward pass beside the hidden states, and what they leave behind."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_bert_tp.model.segments import Segments
from megatron_bert_tp.parallel.random_bits import RandomBits
from megatron_bert_tp.parallel.token_runs import TokenRuns
from megatron_bert_tp.parallel.triton_dropout import KernelBits, TokenBits


@dataclass(frozen=True)
class KeysValues:
    """Keys and values of this rank's heads, each ``[batch, heads / size, keys, head]``."""

    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        """Number of keys."""
        return self.keys.shape[2]


@dataclass(frozen=True)
class LayerCache:
    """What a decoder layer need not compute again: its own keys so far, and those of the encoder."""

    own: KeysValues
    cross: KeysValues | None = None


@dataclass(frozen=True)
class Context:
    """The same for every layer of a pass.

    ``mask`` and ``encoder_mask`` are added to scores ``[batch, heads, queries, keys]``; without ``bits`` there
    is no dropout.  ``head_mask`` ``[layers, 1 or batch, heads / size, 1 or queries, 1 or keys]`` multiplies the
    probabilities of this rank's heads.  ``encoder_states`` ``[batch, keys, hidden]`` are what cross-attention
    looks at, and ``past`` has one cache for each layer.  With ``segments`` there is one row of several
    samples, and the masks are the segments' own.  With ``tokens`` hidden states between the sharded products are
    this rank's run ``[1, tokens / size, hidden]``.  ``recomputes_attention`` lets a layer keep queries, keys and
    values, and compute what follows from them again in the backward.

    With ``kernel_bits`` kernels draw the same bits where they are used; what has no kernel reads ``bits``.
    Where the mask says no more than how many keys a row has, ``key_lengths`` ``[batch]`` say it too.
    """

    mask: Tensor | None = None
    bits: RandomBits | None = None
    head_mask: Tensor | None = None
    encoder_states: Tensor | None = None
    encoder_mask: Tensor | None = None
    past: tuple[LayerCache, ...] | None = None
    segments: Segments | None = None
    tokens: TokenRuns | None = None
    kernel_bits: KernelBits | None = None
    key_lengths: Tensor | None = None
    recomputes_attention: bool = False
    keeps_hidden: bool = False
    keeps_probabilities: bool = False
    keeps_cache: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether attention needs nothing but a mask and dropout, and nobody asks for what is inside."""
        return not (self.keeps_probabilities or self.keeps_cache) and self.head_mask is None and self.past is None

    def sees_encoder(self, number: int) -> bool:
        """Whether layer ``number`` has states of an encoder to look at, given or cached."""
        return self.encoder_states is not None or (
            self.past is not None and self.past[number].cross is not None
        )

    @property
    def hidden_bits(self) -> RandomBits | TokenBits | None:
        """The bits for dropout of hidden states, which also say who computes it."""
        return self.bits if self.kernel_bits is None else self.kernel_bits.tokens

    def of_groups(self) -> tuple["Context", ...]:
        """The same for the samples of each group of the segments, which stand in rows of their own."""
        assert self.segments is not None
        return tuple(self._of_group(number) for number in range(len(self.segments.groups)))

    def _of_group(self, number: int) -> "Context":
        assert self.segments is not None
        group = self.segments.groups[number]
        return replace(
            self,
            mask=group.mask,
            bits=None if self.bits is None else self.bits.of_samples(group.samples),
            kernel_bits=None if self.kernel_bits is None else self.kernel_bits.of_group(number),
            key_lengths=group.key_lengths,
            segments=None,
        )

    def whole(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[batch, sequence, hidden]`` on every rank."""
        return hidden if self.tokens is None else self.tokens.gather(hidden)

    def rows_of_heads(
        self, hidden: Tensor, positions: Tensor | None, *, has_samples: bool
    ) -> tuple[Tensor, Tensor]:
        """What heads read that do not read everything, on every rank.

        States ``[masked, hidden]`` of flat ``positions``, and ``[samples, 1, hidden]`` of the first token of
        each sample; either without sense where it is not asked for.  Where the sequence is
        split they come in one message of ``[masked + samples, hidden]``.
        """
        if self.tokens is None:
            rows = hidden.flatten(0, 1)
            masked = rows if positions is None else rows.index_select(0, positions)
            if self.segments is not None:
                return masked, rows.index_select(0, self.segments.firsts)[:, None]
            # A view would keep all states for the backward of the pooler.
            return masked, hidden[:, :1].clone()
        asked = [] if positions is None else [positions]
        asked += [self._firsts(hidden.device)] if has_samples else []
        num_rows = 0 if positions is None else len(positions)
        fetched = self.tokens.fetch(hidden, torch.cat(asked))
        return fetched[:num_rows], fetched[num_rows:, None]

    def _firsts(self, device: torch.device) -> Tensor:
        """``[samples]`` flat index of the first token of each sample."""
        if self.segments is not None:
            return self.segments.firsts
        assert self.tokens is not None
        return torch.arange(0, self.tokens.num_tokens, self.tokens.sequence, device=device)

    def layer_head_mask(self, number: int) -> Tensor | None:
        """Head mask of one layer."""
        return None if self.head_mask is None else self.head_mask[number]


@dataclass(frozen=True)
class Attended:
    """Result of attention: hidden states, and what they came from, unless it was computed in one go."""

    hidden: Tensor
    probabilities: Tensor | None = None
    seen: KeysValues | None = None


@dataclass(frozen=True)
class Kept:
    """What a layer leaves behind where the context asks for it.

    Probabilities, after dropout and head mask, are ``[batch, heads / size, queries, keys]``.
    """

    probabilities: Tensor | None = None
    cross_probabilities: Tensor | None = None
    cache: LayerCache | None = None


@dataclass(frozen=True)
class Encoded:
    """Result of the layers of a stage.

    ``hidden`` ``[batch, sequence, hidden]``; ``states`` are the inputs of all layers and then ``hidden``, if they
    were asked for; ``kept`` has one entry for each layer.
    """

    hidden: Tensor
    states: tuple[Tensor, ...]
    kept: tuple[Kept, ...]
