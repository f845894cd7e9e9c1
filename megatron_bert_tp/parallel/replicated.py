"""Layers that every tensor rank has whole.

All but those of heads are applied to the own tokens alone where the sequence is split.  Then a rank's gradient
is that of its own tokens, and the sum over the tensor axis is that of the microbatch.
"""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from megatron_bert_tp.parallel.narrow import layer_norm, look_up
from megatron_bert_tp.parallel.sharding import Sharding


class HeadLayerNorm(nn.LayerNorm):
    """torch's LayerNorm, exact also for numbers of 16 bits, on rows that all ranks have, in a head."""

    _kernel: Callable[[Tensor], Tensor] | None = None

    def use_(self, kind: type[nn.Module]) -> None:
        """Compute with another implementation, made by ``kind(normalized_shape, eps=...)``, on these weights."""
        other = kind(self.normalized_shape, eps=self.eps)
        other.weight, other.bias = self.weight, self.bias
        self._kernel = other.forward  # the module itself would be registered here, with its weights once more

    def forward(self, x: Tensor) -> Tensor:
        """``[..., features]`` to the same shape."""
        if self._kernel is not None:
            return self._kernel(x)
        return layer_norm(x, self.weight, self.bias, self.eps)


class LayerNorm(HeadLayerNorm):
    """The same on hidden states, of which a rank may have some tokens alone."""

    SHARDINGS: ClassVar[dict[str, Sharding]] = {
        "weight": Sharding(over_sequence=True),
        "bias": Sharding(over_sequence=True),
    }


class ReplicatedEmbedding(nn.Embedding):
    """torch's embedding of positions or token types, exact also for numbers of 16 bits."""

    SHARDINGS: ClassVar[dict[str, Sharding]] = {"weight": Sharding(over_sequence=True)}

    def forward(self, ids: Tensor) -> Tensor:
        """Ids ``[...]`` int64 to ``[..., features]``."""
        return look_up(ids, self.weight)
