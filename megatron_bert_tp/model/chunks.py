"""All stages that one rank of the pipeline holds: one, or several virtual ones."""

from collections.abc import Iterator, Sequence

from torch import nn

from megatron_bert_tp.model.shape import ModelShape
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.parallel.gradients import TiedWeight
from megatron_bert_tp.parallel.replicated import HeadLayerNorm
from megatron_bert_tp.parallel.sharding import Part


class Chunks(Sequence[MegatronBertStage]):
    """The stages of one rank in the order of their chunk numbers, and what they hold together.

    Where the first and the last stage of the pipeline are both here, the tied weight is one storage with two
    leaves, as it is within a single stage.
    """

    def __init__(self, stages: Sequence[MegatronBertStage]) -> None:
        self._stages = tuple(stages)
        tied = self.tied()
        if tied is not None and tied.lookup is not None and tied.projection is not None:
            tied.projection.data = tied.lookup.data

    def __getitem__(self, chunk: int) -> MegatronBertStage:  # type: ignore[override]
        return self._stages[chunk]

    def __len__(self) -> int:
        return len(self._stages)

    def __iter__(self) -> Iterator[MegatronBertStage]:
        return iter(self._stages)

    @property
    def shape(self) -> ModelShape:
        """The sizes of the whole model."""
        return self._stages[0].shape

    @property
    def is_training(self) -> bool:
        """Whether dropout is on."""
        return all(stage.training for stage in self._stages)

    def train(self, is_training: bool = True) -> None:
        """Turn dropout on, or off."""
        for stage in self._stages:
            stage.train(is_training)

    def use_norm_(self, kind: type[nn.Module]) -> None:
        """Compute all LayerNorms with another implementation, such as apex' MixedFusedLayerNorm."""
        for stage in self._stages:
            for layer in stage.modules():
                if isinstance(layer, HeadLayerNorm):
                    layer.use_(kind)

    def parts(self) -> list[Part]:
        """Every named rectangle of a tensor that this rank holds."""
        return [part for stage in self._stages for part in stage.parts()]

    def tied(self) -> TiedWeight | None:
        """The copies of the word embeddings here, or None when they are not tied or not on this rank."""
        found = [tied for tied in (stage.tied() for stage in self._stages) if tied is not None]
        if not found:
            return None
        lookups = [tied.lookup for tied in found if tied.lookup is not None]
        projections = [tied.projection for tied in found if tied.projection is not None]
        return TiedWeight(lookups[0] if lookups else None, projections[0] if projections else None)

    def freeze_(self, num_layers: int | None) -> None:
        """Keep embeddings and the lowest ``num_layers`` layers of the whole model as they are; None: all learn."""
        if num_layers is None:
            return
        frozen = ("bert.embeddings.", *(f"bert.encoder.layer.{number}." for number in range(num_layers)))
        for part in self.parts():
            if part.name.startswith(frozen):
                part.parameter.requires_grad_(False)

    def trained_parts(self) -> list[Part]:
        """Parts that have a gradient, both copies of a tied weight too.

        Not those that are frozen, nor positions that nothing reads.
        """
        idle = {"bert.embeddings.position_embeddings.weight"} if self.shape.is_relative else set()
        return [part for part in self.parts() if part.name not in idle and part.parameter.requires_grad]
