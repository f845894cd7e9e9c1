"""The stages of one rank, and how microbatches go through them: to train, to measure, to predict."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_bert_tp.model.chunks import Chunks
from megatron_bert_tp.parallel.mesh import ParallelMesh
from megatron_bert_tp.pipeline.executor import Criterion, Executor
from megatron_bert_tp.pipeline.instructions import Program
from megatron_bert_tp.reliability.actions import Actions
from megatron_bert_tp.training.passes import Passes


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Stages, programs and the mesh that they run on; ``actions`` is told what this rank does."""

    chunks: Chunks
    passes: Passes
    mesh: ParallelMesh
    device: torch.device
    actions: Actions

    @property
    def stages(self) -> Sequence[int]:
        """Numbers of this rank's stages in the whole pipeline."""
        return self.passes.placement.stages[self.mesh.pipeline.rank]

    @property
    def num_outputs(self) -> int:
        """Logits of a sample, a choice or a token, of a head that classifies."""
        stage = self.chunks[0]
        return stage.head.rows(stage.shape)

    def train(
        self,
        batches: Sequence[Any],
        criterion: Criterion[Any],
        *,
        loss_scale: float = 1.0,
        is_observed: bool = True,
    ) -> list[Tensor]:
        """Forwards and backwards of a step; the criterion's statistics on the last stage, else nothing."""
        program = self.passes.training(len(batches), self.mesh.pipeline.rank)
        return self._run(program, batches, criterion, loss_scale=loss_scale, is_observed=is_observed)

    def measure(self, batches: Sequence[Any], criterion: Criterion[Any]) -> list[Tensor]:
        """Forwards alone, without dropout; the criterion's statistics on the last stage, else nothing."""
        program = self.passes.evaluation(len(batches), self.mesh.pipeline.rank)
        self.chunks.train(False)
        try:
            return self._run(program, batches, criterion)
        finally:
            self.chunks.train()

    def _run(
        self,
        program: Program,
        batches: Sequence[Any],
        criterion: Criterion[Any],
        *,
        loss_scale: float = 1.0,
        is_observed: bool = True,
    ) -> list[Tensor]:
        executor = Executor[Any](
            self.chunks,
            criterion,
            placement=self.passes.placement,
            axis=self.mesh.pipeline,
            channels=self.mesh.channels,
            device=self.device,
            observe=self.actions.instruction if is_observed else None,
        )
        return executor.run(program, batches, loss_scale=loss_scale)
