"""The layers of one stage, one after another."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_bert_tp.model.context import Context, Encoded, Kept
from megatron_bert_tp.model.layer import Layer
from megatron_bert_tp.model.recompute import Recompute
from megatron_bert_tp.model.shape import ModelShape
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.replicated import LayerNorm
from megatron_bert_tp.pipeline.partition import StagePlan


class Layers(nn.ModuleDict):
    """Layers under their global numbers, which need not begin at 0; ``layers[3]`` is number 3, a slice several.

    Iterating gives the layers, as it does in `transformers`.
    """

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, slice):
            return list(self.values())[key]
        if isinstance(key, int) and key < 0:
            return list(self.values())[key]
        return super().__getitem__(str(key))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values())

    def keys(self) -> Any:
        """Numbers as text."""
        return self._modules.keys()


class Encoder(nn.Module):
    """The layers of one stage under their global numbers, and the final LayerNorm on the last.

    ``recompute`` says what training computes again in the backward.
    """

    def __init__(
        self,
        shape: ModelShape,
        plan: StagePlan,
        *,
        axis: Axis,
        dtype: torch.dtype,
        recompute: Recompute | None = None,
    ) -> None:
        super().__init__()
        self.is_last, self.recompute = plan.is_last, recompute or Recompute()
        self.layer = Layers(
            {str(number): Layer(shape, number, axis=axis, dtype=dtype) for number in plan.layers}
        )
        if plan.is_last:
            self.ln = LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps, dtype=dtype)

    @property
    def recomputes(self) -> bool:
        """Whether every layer computes its whole inside again."""
        return self.recompute == Recompute("full")

    @recomputes.setter
    def recomputes(self, is_full: bool) -> None:
        """Compute everything again, or nothing."""
        self.recompute = Recompute("full" if is_full else "none")

    def forward(self, hidden: Tensor, context: Context) -> Encoded:
        """``[batch, sequence, hidden]`` to the same shape, and what the context asks for."""
        states: list[Tensor] = []
        kept: list[Kept] = []
        for layer in self.layer.values():
            if context.keeps_hidden:
                states.append(hidden)
            hidden, left = self._run(cast(Layer, layer), hidden, context)
            kept.append(left)
        if self.is_last:
            hidden = self.ln(hidden)
        return Encoded(hidden, (*states, hidden) if context.keeps_hidden else (), tuple(kept))

    def _run(self, layer: Layer, hidden: Tensor, context: Context) -> tuple[Tensor, Kept]:
        kind = self.recompute.of_layer(layer.number) if self.training else "none"
        if kind == "full":
            again = checkpoint(layer, hidden, context, use_reentrant=False, preserve_rng_state=False)
            return cast(tuple[Tensor, Kept], again)
        if kind == "selective" and context.is_plain:
            context = replace(context, recomputes_attention=True)
        return cast(tuple[Tensor, Kept], layer(hidden, context))
