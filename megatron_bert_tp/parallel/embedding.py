"""Word embeddings whose rows are split over the tensor axis (Shoeybi et al. 2019, section 3)."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from megatron_bert_tp.parallel.collectives import reduce_from, scatter_sum_to
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.narrow import look_up
from megatron_bert_tp.parallel.sharding import Sharding, padded_share


class VocabParallelEmbedding(nn.Module):
    """Embedding of ``num_rows`` ids, a contiguous range of rows per rank.

    A rank looks up the ids that it owns and gives zeros for the others; one all-reduce adds them.  Ids
    ``[...]`` int64, output ``[..., features]``, equal on all ranks.  The row ``padding_idx`` gets no gradient
    from the lookup, as in Hugging Face; rows past ``num_rows`` are padding and never read.  With
    ``splits_sequence`` ids ``[1, tokens]`` give this rank's run ``[1, tokens / size, features]``: a reduce-scatter
    in the place of the all-reduce, and backward an all-gather.
    """

    SHARDINGS: ClassVar[dict[str, Sharding]] = {"weight": Sharding(dim=0)}
    splits_sequence = False

    def __init__(
        self, num_rows: int, features: int, *, axis: Axis, dtype: torch.dtype, padding_idx: int | None = None
    ) -> None:
        super().__init__()
        self.axis = axis
        self.full_shapes = {"weight": (num_rows, features)}
        self.padding_idx = padding_idx
        self.share = padded_share(num_rows, axis)
        self.weight = nn.Parameter(torch.zeros(self.share, features, dtype=dtype))
        self.first_row = axis.rank * self.share
        self._padding_row = self._local_row(padding_idx)

    def _local_row(self, row: int | None) -> int | None:
        is_here = row is not None and 0 <= row - self.first_row < self.share
        return row - self.first_row if row is not None and is_here else None

    def forward(self, ids: Tensor) -> Tensor:
        """``[...]`` ids to ``[..., features]``."""
        if self.axis.size == 1:
            return look_up(ids, self.weight, padding_idx=self._padding_row)
        rows = ids - self.first_row
        elsewhere = (rows < 0) | (rows >= self.share)
        found = look_up(rows.masked_fill(elsewhere, 0), self.weight, padding_idx=self._padding_row)
        found = found.masked_fill(elsewhere.unsqueeze(-1), 0)
        return scatter_sum_to(found[0], self.axis)[None] if self.splits_sequence else reduce_from(found, self.axis)
