"""One pass over all layers with the arguments of a forward call."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from megatron_bert_tp.family.arguments import (
    Arguments,
    check_decoder,
    check_range,
    check_states,
    check_words,
    head_mask_of,
)
from megatron_bert_tp.family.cache import KeyValueCache, cache_of
from megatron_bert_tp.family.config import MegatronBertConfig
from megatron_bert_tp.family.outputs import Tensors
from megatron_bert_tp.model.context import Context, Encoded
from megatron_bert_tp.model.masks import cross_attention_mask, self_attention_mask
from megatron_bert_tp.model.stage import Trunk
from megatron_bert_tp.parallel.collectives import gather_from
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.random_bits import RandomBits


@dataclass(frozen=True)
class Passed:
    """What the heads read after the layers; the optional fields are None where they were not asked for."""

    hidden: Tensor
    bits: RandomBits | None
    cache: KeyValueCache | None
    states: Tensors | None
    attentions: Tensors | None
    cross_attentions: Tensors | None


def run_trunk(
    trunk: Trunk, arguments: Arguments, config: MegatronBertConfig, *, bits: RandomBits | None, axis: Axis
) -> Passed:
    """Embeddings and all layers; ArgumentError for arguments that do not fit the model or each other."""
    shape, words = config.shape, arguments.words
    dtype = trunk.embeddings.token_type_embeddings.weight.dtype
    num_heads = shape.num_attention_heads // axis.size
    heads = range(axis.rank * num_heads, (axis.rank + 1) * num_heads)
    past = None
    check_states(arguments.encoder_hidden_states, words, shape.hidden_size, dtype)
    if arguments.past_key_values is not None:
        past = cache_of(
            arguments.past_key_values, num_layers=shape.num_hidden_layers, num_heads=num_heads
        )
    check_decoder(arguments, shape, past)
    first = past.get_seq_length() if past else 0
    check_words(words, shape, past=first, dtype=dtype)
    token_types = _token_types(arguments, words)
    check_range(token_types, shape.type_vocab_size, "token_type_ids")
    positions = _positions(arguments.position_ids, words, first)
    check_range(positions, shape.max_position_embeddings, "position_ids")
    embedded = trunk.embeddings(words, token_types, bits, position_ids=positions)
    encoder = arguments.encoder_hidden_states
    context = Context(
        mask=self_attention_mask(
            arguments.attention_mask,
            queries=words.shape[1],
            keys=first + words.shape[1],
            is_causal=shape.is_decoder,
            like=embedded,
        ),
        bits=bits,
        head_mask=head_mask_of(arguments.head_mask, shape, heads, embedded.dtype, axis=axis),
        encoder_states=encoder,
        encoder_mask=_encoder_mask(arguments, words, past, embedded.dtype),
        past=past.layers if past else None,
        keeps_hidden=_chosen(arguments.output_hidden_states, config.output_hidden_states),
        keeps_probabilities=_chosen(arguments.output_attentions, config.output_attentions),
        keeps_cache=shape.is_decoder and _chosen(arguments.use_cache, config.use_cache),
    )
    return _passed(trunk.encoder(embedded, context), context, axis)


def _passed(encoded: Encoded, context: Context, axis: Axis) -> Passed:
    """The heads of all ranks together."""
    own = [kept.probabilities for kept in encoded.kept if kept.probabilities is not None]
    cross = [kept.cross_probabilities for kept in encoded.kept if kept.cross_probabilities is not None]
    caches = [kept.cache for kept in encoded.kept if kept.cache is not None]
    return Passed(
        hidden=encoded.hidden,
        bits=context.bits,
        cache=KeyValueCache(tuple(caches)) if context.keeps_cache else None,
        states=encoded.states if context.keeps_hidden else None,
        attentions=_whole(own, axis) if context.keeps_probabilities else None,
        cross_attentions=_whole(cross, axis) if cross else None,
    )


def _whole(probabilities: list[Tensor], axis: Axis) -> Tensors:
    return tuple(gather_from(each, axis, dim=1) for each in probabilities)


def _token_types(arguments: Arguments, words: Tensor) -> Tensor:
    if arguments.token_type_ids is not None:
        return arguments.token_type_ids
    return torch.zeros(words.shape[:2], dtype=torch.long, device=words.device)


def _positions(given: Tensor | None, words: Tensor, first: int) -> Tensor | None:
    """Positions ``[1 or batch, sequence]``; None for those from 0."""
    if given is not None or not first:
        return given
    return torch.arange(first, first + words.shape[1], device=words.device)[None]


def _encoder_mask(
    arguments: Arguments, words: Tensor, past: KeyValueCache | None, dtype: torch.dtype
) -> Tensor | None:
    """Mask over the encoder's states, which are given, or known by the cache alone."""
    cached = past.layers[0].cross if past else None
    states = arguments.encoder_hidden_states
    if states is None and cached is None:
        return None
    keys = cached.length if cached is not None else cast(Tensor, states).shape[1]
    return cross_attention_mask(
        arguments.encoder_attention_mask, queries=words.shape[1], keys=keys, dtype=dtype
    )


def _chosen(argument: bool | None, setting: bool) -> bool:
    return setting if argument is None else argument
