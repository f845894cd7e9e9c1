"""Arguments of a forward call, checked and turned into what the layers read."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypedDict

import torch
from torch import Tensor

from megatron_bert_tp.errors import ArgumentError
from megatron_bert_tp.family.cache import KeyValueCache, PastKeyValues
from megatron_bert_tp.model.shape import ModelShape
from megatron_bert_tp.parallel.collectives import copy_to
from megatron_bert_tp.parallel.mesh import Axis

_FIRST = ("input_ids", "attention_mask", "token_type_ids")
_LABELS = ("labels", "next_sentence_label", "start_positions", "end_positions", "logits_to_keep")


class EncoderArguments(TypedDict, total=False):
    """Arguments that every class takes beside ids, mask, segments and labels."""

    position_ids: Tensor | None
    head_mask: Tensor | None
    inputs_embeds: Tensor | None
    output_attentions: bool | None
    output_hidden_states: bool | None
    return_dict: bool | None
    sample_numbers: tuple[int, ...] | None


class CrossArguments(EncoderArguments, total=False):
    """And those of the classes that may look at an encoder."""

    encoder_hidden_states: Tensor | None
    encoder_attention_mask: Tensor | None


class DecoderArguments(CrossArguments, total=False):
    """And those of the classes that may go on from a cache."""

    past_key_values: PastKeyValues | None
    use_cache: bool | None


@dataclass(frozen=True)
class Arguments:
    """All arguments of one call, labels apart.

    ``input_ids`` ``[batch, sequence]`` or ``inputs_embeds`` ``[batch, sequence, hidden]``; masks as
    `model.masks.self_attention_mask` takes them; ``token_type_ids`` and ``position_ids`` ``[1 or batch,
    sequence]``; ``head_mask`` ``[heads]``, ``[layers, heads]`` or five dims that begin so; the encoder's states
    ``[batch, keys, hidden]``.  ``sample_numbers`` ``[batch]`` name the dropout bits.
    """

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None
    head_mask: Tensor | None = None
    inputs_embeds: Tensor | None = None
    encoder_hidden_states: Tensor | None = None
    encoder_attention_mask: Tensor | None = None
    past_key_values: PastKeyValues | None = None
    use_cache: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    return_dict: bool | None = None
    sample_numbers: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls, allowed: type, first: tuple[Tensor | None, Tensor | None, Tensor | None], more: Mapping[str, Any]
    ) -> "Arguments":
        """The ``first`` three and those by name, which ``allowed``, one of the classes above, must know.

        TypeError, as Python itself has it, for a name that the class of the model does not take.
        """
        unknown = sorted(more.keys() - set(allowed.__annotations__))
        if unknown:
            raise TypeError(_untaken(unknown[0], [*_FIRST, *allowed.__annotations__]))
        return cls(*first, **more)

    @property
    def words(self) -> Tensor:
        """Ids or embedded words, whichever is given; ArgumentError unless it is one of them."""
        if (self.input_ids is None) == (self.inputs_embeds is None):
            given = "neither" if self.input_ids is None else "both"
            raise ArgumentError(f"give either input_ids or inputs_embeds; {given} of them is there")
        words = self.inputs_embeds if self.input_ids is None else self.input_ids
        assert words is not None
        return words


def _untaken(name: str, names: list[str]) -> str:
    """Why an argument is not taken, and what is meant, or which there are."""
    near = get_close_matches(name, [*names, *_LABELS], n=1)
    reason = "this class has no use for it; " if name in {*_LABELS, *Arguments.__annotations__} else ""
    if near and not reason:
        return f"forward() does not take {name!r}; did you mean {near[0]}?"
    return f"forward() does not take {name!r}; {reason}it takes {', '.join(names)}, and its labels"


def check_words(words: Tensor, shape: ModelShape, *, past: int, dtype: torch.dtype) -> None:
    """ArgumentError where ids are no words of the vocabulary, or the input is longer than the positions.

    ``dtype`` is that of the model, which embedded words must have too.
    """
    expected = 3 if words.is_floating_point() else 2
    if words.dim() != expected:
        raise ArgumentError(
            f"the input has the shape {tuple(words.shape)}; input_ids are [batch, sequence], and inputs_embeds "
            "[batch, sequence, hidden]"
        )
    if expected == 3 and (words.dtype != dtype or words.shape[2] != shape.hidden_size):
        raise ArgumentError(
            f"inputs_embeds are {words.dtype} with {words.shape[2]} features, and the model is {dtype} with "
            f"{shape.hidden_size}; give what get_input_embeddings() would"
        )
    length = past + words.shape[1]
    if length > shape.max_position_embeddings:
        raise ArgumentError(
            f"the input has {length} positions, cached ones included, but max_position_embeddings is "
            f"{shape.max_position_embeddings}; cut it, or use a model with more positions"
        )
    # Split over ranks, an id that nobody owns would be embedded as zeros.
    if expected == 2:
        check_range(words, shape.vocab_size, "input_ids", hint="; was the text encoded with another tokenizer?")


def check_range(ids: Tensor | None, size: int, name: str, *, hint: str = "") -> None:
    """ArgumentError for numbers that are not from 0 to below ``size``; a GPU is not waited for."""
    if ids is None or ids.device.type != "cpu" or not ids.numel():
        return
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0 or largest >= size:
        raise ArgumentError(f"{name} go from {smallest} to {largest}, but must be from 0 to {size - 1}{hint}")


def check_states(states: Tensor | None, words: Tensor, hidden_size: int, dtype: torch.dtype) -> None:
    """ArgumentError for states of an encoder that the model cannot look at."""
    if states is None:
        return
    fits = states.dim() == 3 and (states.shape[0], states.shape[2]) == (words.shape[0], hidden_size)
    if not fits or states.dtype != dtype:
        raise ArgumentError(
            f"encoder_hidden_states are {states.dtype} {tuple(states.shape)}; they must be {dtype} [batch, keys, "
            f"hidden], here with batch {words.shape[0]} and hidden {hidden_size}"
        )


def head_mask_of(
    given: Tensor | None, shape: ModelShape, heads: range, dtype: torch.dtype, *, axis: Axis
) -> Tensor | None:
    """Mask ``[layers, 1 or batch, heads / size, 1 or queries, 1 or keys]`` of this rank's heads.

    Its gradient, by which the importance of heads is measured, is whole on every rank.
    """
    if given is None:
        return None
    layers, num_heads = shape.num_hidden_layers, shape.num_attention_heads
    mask = copy_to(given.to(dtype), axis)
    if given.dim() == 1:
        mask = mask.expand(layers, -1)
    if mask.dim() == 2:
        mask = mask[:, None, :, None, None]
    if mask.dim() != 5 or mask.shape[0] != layers or mask.shape[2] != num_heads:
        raise ArgumentError(
            f"head_mask has the shape {tuple(given.shape)}; give [heads] or [layers, heads], here {num_heads} "
            f"heads and {layers} layers, or [layers, batch, heads, queries, keys]"
        )
    return mask[:, :, heads.start : heads.stop]


def check_decoder(arguments: Arguments, shape: ModelShape, cache: KeyValueCache | None) -> None:
    """ArgumentError for what would have no effect: only a decoder has a cache and looks at an encoder."""
    if arguments.position_ids is not None and shape.is_relative:
        raise ArgumentError(
            f"position_ids have no effect with position_embedding_type {shape.position_embedding_type!r}, which "
            "counts distances from token to token; leave them out"
        )
    has_states = arguments.encoder_hidden_states is not None or (cache is not None and cache.sees_encoder)
    if shape.is_decoder:
        if arguments.encoder_attention_mask is not None and not has_states:
            raise ArgumentError(
                "encoder_attention_mask is there without encoder_hidden_states; give both, or neither"
            )
        if arguments.encoder_hidden_states is not None and not shape.add_cross_attention:
            raise ArgumentError(
                "encoder_hidden_states need cross-attention layers, and this model has none; make it with "
                "add_cross_attention=True"
            )
        return
    named = {
        "past_key_values": cache,
        "encoder_hidden_states": arguments.encoder_hidden_states,
        "encoder_attention_mask": arguments.encoder_attention_mask,
        "use_cache": arguments.use_cache or None,
    }
    used = [name for name, value in named.items() if value is not None]
    if used:
        raise ArgumentError(
            f"{used[0]} is for decoders, and this model is an encoder, in which every position sees every other; "
            "make it with is_decoder=True"
        )
