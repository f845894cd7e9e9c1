"""Which activations of a layer are kept for the backward, and which are computed again in it."""

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_bert_tp.errors import ConfigError

Kind = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Recompute:
    """What is computed again in the backward, in the layers whose global number is a multiple of ``every``.

    ``full``: everything between the inputs of a layer and of the next (Chen et al. 2016).  ``selective``: what
    lies between queries, keys and values and the joined heads, which takes much memory and little arithmetic
    (Korthikanti et al. 2022, section 5).  Dropout bits are named, so they are the same the second time.
    """

    kind: Kind = "none"
    every: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"recompute is {self.kind!r}; it must be one of {', '.join(get_args(Kind))}")
        if self.every < 1:
            raise ConfigError(f"every is {self.every}; it must be at least 1, which recomputes in all layers")

    def of_layer(self, number: int) -> Kind:
        """What layer ``number`` computes again."""
        return "none" if number % self.every else self.kind
