"""Which samples a step trains on: a pure function of the seed and the samples consumed."""

from dataclasses import dataclass

import numpy as np

from megatron_bert_tp.data.draws import Ints, Purpose, draw, streams


class SampleOrder:
    """Sample numbers count over all epochs; each epoch visits every span once, in an order of its own."""

    def __init__(self, num_spans: int, seed: int):
        self.num_spans = num_spans
        self._seed = seed
        self._orders: dict[int, Ints] = {}

    def sample_at(self, number: int) -> tuple[int, int]:
        """Epoch and span of one sample number."""
        epoch, place = divmod(number, self.num_spans)
        return epoch, int(self._order(epoch)[place])

    def spans(self, numbers: Ints) -> Ints:
        """Span of each sample number; the same shape as ``numbers``."""
        epochs, places = np.divmod(numbers, self.num_spans)
        spans = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            is_here = epochs == epoch
            spans[is_here] = self._order(epoch)[places[is_here]]
        return spans

    def _order(self, epoch: int) -> Ints:
        """The spans in the order of one epoch; the two latest are kept, as a step may span both."""
        if epoch not in self._orders:
            stream = streams(self._seed, Purpose.ORDER, np.array([epoch]))
            order = np.argsort(draw(stream, np.arange(self.num_spans)), kind="stable")
            kept = sorted(self._orders)[-1:]
            self._orders = {**{e: self._orders[e] for e in kept}, epoch: order}
        return self._orders[epoch]


@dataclass(frozen=True, kw_only=True)
class BatchShare:
    """Which part of each global batch one replica computes, and in what portions.

    The global batch is cut into microbatches in order, dealt out to the data ranks one by one, so that
    the microbatches themselves do not depend on the number of ranks.
    """

    global_batch: int
    """Samples of a step; a multiple of microbatch x data_size."""
    microbatch: int
    """Samples of one forward pass."""
    data_rank: int = 0
    data_size: int = 1

    def numbers_from(self, first: int) -> list[Ints]:
        """Sample numbers of each microbatch of this replica in the step that begins with sample ``first``."""
        return self._mine(np.arange(first, first + self.global_batch))

    def numbers_of_evaluation(self, num_samples: int) -> list[Ints]:
        """The same for samples 0..num_samples-1, where the last microbatch may be short.

        Replicas differ by at most one microbatch; none is empty.
        """
        return self._mine(np.arange(num_samples))

    def _mine(self, numbers: Ints) -> list[Ints]:
        cuts = range(0, len(numbers), self.microbatch)
        return [numbers[cut : cut + self.microbatch] for cut in cuts[self.data_rank :: self.data_size]]
