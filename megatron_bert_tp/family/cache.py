"""Keys and values of a decoder's layers so far, and their old form as nested tuples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bert_tp.errors import ArgumentError
from megatron_bert_tp.model.context import KeysValues, LayerCache


@dataclass(frozen=True)
class KeyValueCache:
    """One `LayerCache` a layer; a forward pass gives a longer one and leaves this one as it is.

    It reads like the tuples of older releases: ``cache[layer]`` is ``(key, value)``, and ``(key, value, encoder
    key, encoder value)`` with cross-attention, each ``[batch, heads, positions, head]``.  Under tensor
    parallelism the heads are those of this rank.
    """

    layers: tuple[LayerCache, ...]

    def get_seq_length(self) -> int:
        """Positions that are cached."""
        return self.layers[0].own.length

    @property
    def sees_encoder(self) -> bool:
        """Whether the keys of an encoder are cached too."""
        return self.layers[0].cross is not None

    def to_legacy_cache(self) -> tuple[tuple[Tensor, ...], ...]:
        """Nested tuples."""
        return tuple(map(_tuple_of, self.layers))

    @classmethod
    def from_legacy_cache(cls, layers: Sequence[Sequence[Tensor]]) -> "KeyValueCache":
        """Cache from nested tuples; ArgumentError when a layer has neither two nor four tensors."""
        return cls(tuple(map(_layer_of, layers)))

    def __getitem__(self, layer: int) -> tuple[Tensor, ...]:
        return _tuple_of(self.layers[layer])

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter(self.to_legacy_cache())

    def __len__(self) -> int:
        return len(self.layers)


PastKeyValues = KeyValueCache | Sequence[Sequence[Tensor]]


def cache_of(given: PastKeyValues, *, num_layers: int, num_heads: int) -> KeyValueCache:
    """Either form as a cache; ArgumentError when it does not fit the model on this rank."""
    if not isinstance(given, KeyValueCache | Sequence):
        raise ArgumentError(
            f"past_key_values is a {type(given).__name__}; give the cache of an earlier output of this model, or "
            "nested tuples of tensors"
        )
    cache = given if isinstance(given, KeyValueCache) else KeyValueCache.from_legacy_cache(given)
    if len(cache) != num_layers:
        raise ArgumentError(f"past_key_values has {len(cache)} layers, but the model has {num_layers}")
    heads = cache.layers[0].own.keys.shape[1]
    if heads != num_heads:
        raise ArgumentError(
            f"past_key_values has {heads} heads, but this rank has {num_heads} of the model's; a cache stays on "
            "the ranks that made it"
        )
    return cache


def _tuple_of(layer: LayerCache) -> tuple[Tensor, ...]:
    own = (layer.own.keys, layer.own.values)
    return own if layer.cross is None else (*own, layer.cross.keys, layer.cross.values)


def _layer_of(tensors: Sequence[Tensor]) -> LayerCache:
    are_fit = all(isinstance(each, torch.Tensor) and each.dim() == 4 for each in tensors)
    if len(tensors) not in (2, 4) or not are_fit:
        raise ArgumentError(
            f"a layer of past_key_values has {len(tensors)} entries; give (key, value), or (key, value, encoder "
            "key, encoder value), each [batch, heads, positions, head], or the cache of an earlier output"
        )
    own, *cross = (KeysValues(tensors[at], tensors[at + 1]) for at in range(0, len(tensors), 2))
    return LayerCache(own, cross[0] if cross else None)
