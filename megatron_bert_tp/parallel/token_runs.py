"""Sequence parallelism: between the sharded products each tensor rank has its own run of tokens alone.

LayerNorm, dropout and the residual work on each token by itself, so any cut of a microbatch will do
(Korthikanti et al. 2022, section 4.2.2).  This one cuts the tokens of all rows as they lie in memory, so that the
ranks' runs are gathered without a copy, and packed rows need nothing of their own::

    batch 2 x sequence 5, size 4      a a a a a b b b b b . .      padded to a multiple of the size
                                      |- 0 -|- 1 -|- 2 -|- 3 -|    runs of 3 tokens

The padding at the end is cut off where rows are looked at as rows, and so has no influence and no gradient.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from megatron_bert_tp.parallel.collectives import gather_from, reduce_from
from megatron_bert_tp.parallel.mesh import Axis


@dataclass(frozen=True)
class TokenRuns:
    """How the ``batch`` x ``sequence`` tokens of a microbatch lie on the ranks of ``axis``."""

    batch: int
    sequence: int
    axis: Axis

    @property
    def num_tokens(self) -> int:
        """Tokens of the microbatch, without the padding at the end."""
        return self.batch * self.sequence

    @property
    def length(self) -> int:
        """Tokens of every rank, the padding included."""
        return -(-self.num_tokens // self.axis.size)

    @property
    def own(self) -> range:
        """Flat indices of this rank's tokens; those from `num_tokens` on are padding."""
        return range(self.axis.rank * self.length, (self.axis.rank + 1) * self.length)

    def padded(self, whole: Tensor, *, value: int = 0) -> Tensor:
        """``[batch, sequence, ...]`` to ``[1, size x length, ...]`` with ``value`` at the padding."""
        flat = whole.flatten(0, 1)
        extra = self.axis.size * self.length - self.num_tokens
        if extra:
            flat = F.pad(flat, (0, 0) * (flat.dim() - 1) + (0, extra), value=value)
        return flat[None]

    def rows(self, padded: Tensor) -> Tensor:
        """The way back: ``[1, size x length, ...]`` to ``[batch, sequence, ...]``."""
        return padded[0, : self.num_tokens].view(self.batch, self.sequence, *padded.shape[2:])

    def of_rank(self, whole: Tensor) -> Tensor:
        """This rank's run ``[1, length, ...]`` of ``[batch, sequence, ...]``, which needs no gradient."""
        return self.padded(whole)[:, self.own.start : self.own.stop]

    def gather(self, own: Tensor) -> Tensor:
        """Runs ``[1, length, hidden]`` of all ranks as ``[batch, sequence, hidden]``: one all-gather.

        Backward takes the own run of a gradient that is equal on all ranks, without a message.
        """
        return self.rows(gather_from(own, self.axis, dim=1))

    def fetch(self, own: Tensor, tokens: Tensor) -> Tensor:
        """Hidden states ``[chosen, hidden]`` of the ``tokens`` ``[chosen]``, flat indices, whoever has them.

        Each rank gives those that it has and zeros for the others, and one all-reduce adds them.  Backward takes
        what is its own of a gradient that is equal on all ranks, without a message.
        """
        places = tokens - self.own.start
        elsewhere = (places < 0) | (places >= self.length)
        found = own[0].index_select(0, places.masked_fill(elsewhere, 0))
        return reduce_from(found.masked_fill(elsewhere[:, None], 0), self.axis)
