"""Learning rates that fall from the head to the embeddings, layer by layer."""

import re
from collections.abc import Callable

RateFactor = Callable[[str], float]
"""Factor on the learning rate of a tensor, by its name."""
_LAYER = re.compile(r"bert\.encoder\.layer\.(\d+)\.")


def rate_factor(num_layers: int, decay: float) -> RateFactor:
    """Factors of a model of ``num_layers`` layers: 1 for head, pooler and last LayerNorm, ``decay`` for the top
    layer, and ``decay`` times that of the layer above for each other one and for the embeddings.

    Howard and Ruder 2018, section 3.2, call it discriminative fine-tuning.
    """

    def factor(name: str) -> float:
        if name.startswith("bert.embeddings."):
            return float(decay ** (num_layers + 1))
        layer = _LAYER.match(name)
        return 1.0 if layer is None else float(decay ** (num_layers - int(layer.group(1))))

    return factor


def same_rate(_name: str) -> float:
    """The same rate for all tensors."""
    return 1.0
