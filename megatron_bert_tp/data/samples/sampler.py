"""Which samples a step trains on: a pure function of the seed and the samples consumed."""

import numpy as np

from megatron_bert_tp.data.draws import Ints, Purpose, draw, streams
from megatron_bert_tp.data.samples.shuffle import permuted


class SampleOrder:
    """Sample numbers count over all epochs; each epoch visits every span once, in an order of its own.

    The order of an epoch is a permutation that is computed where it is asked, by (seed, corpus, epoch): it
    takes no memory, and one integer, the samples done, says where a run stands.
    """

    def __init__(self, num_spans: int, seed: int, *, corpus: int = 0):
        self.num_spans = num_spans
        self._stream = streams(seed, Purpose.ORDER, np.array([corpus]))

    def sample_at(self, number: int) -> tuple[int, int]:
        """Epoch and span of one sample number."""
        return number // self.num_spans, int(self.spans(np.array([number]))[0])

    def spans(self, numbers: Ints) -> Ints:
        """Span of each sample number; ``numbers`` and the answer are ``[samples]``."""
        epochs, places = np.divmod(numbers, self.num_spans)
        return permuted(places, self.num_spans, draw(self._stream, epochs))
