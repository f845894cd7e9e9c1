"""Sample numbers to microbatches."""

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import numpy as np

from megatron_bert_tp.config.schema import MaskingConfig
from megatron_bert_tp.data.batch import Batch, MaskedSamples, empty_batch, packed_batch, padded_batch
from megatron_bert_tp.data.draws import Ints
from megatron_bert_tp.data.packing import Cutting, rounded
from megatron_bert_tp.data.samples.masking import mask_rows
from megatron_bert_tp.data.samples.pairs import Pairs, Rows
from megatron_bert_tp.data.tokenizer import Vocabulary


class Samples(Protocol):
    """Where samples come from (`data.samples.source.SampleSource` fits it)."""

    @property
    def num_samples_per_epoch(self) -> int:
        """Samples that visit all text once."""

    def pairs(self, numbers: Ints) -> Pairs:
        """Where the samples ``numbers`` stand in the text, and with it how long they are."""

    def rows(self, pairs: Pairs, vocabulary: Vocabulary, *, width: int) -> Rows:
        """The samples before masking, ``width`` wide."""


class PretrainingBatches:
    """Microbatches of one replica for masked language modelling and sentence pairs.

    A sample is a pure function of (seed, sample number), so that every tensor and pipeline rank of a
    replica makes the same batch by itself.  Sample numbers count over all epochs.  ``size_of`` tells the
    samples of the step that follows so many.
    """

    def __init__(
        self,
        samples: Samples,
        vocabulary: Vocabulary,
        *,
        sequence_length: int,
        masking: MaskingConfig,
        seed: int,
        size_of: Callable[[int], int],
        cutting: Cutting,
    ):
        self._samples, self._vocabulary = samples, vocabulary
        self._sequence_length, self._masking, self._seed = sequence_length, masking, seed
        self._size_of, self._cutting = size_of, cutting

    @property
    def num_samples_per_epoch(self) -> int:
        """Samples that visit all text once."""
        return self._samples.num_samples_per_epoch

    def take(self, samples_done: int) -> list[Batch]:
        """Microbatches of this replica in the step that follows ``samples_done`` samples."""
        return self._cut(np.arange(samples_done, samples_done + self._size_of(samples_done)))

    def evaluation(self, num_samples: int) -> list[Batch]:
        """This replica's microbatches of the first samples, at most one epoch; always the same, masks included."""
        return self._cut(np.arange(min(num_samples, self.num_samples_per_epoch)))

    def sample(self, number: int) -> Batch:
        """One sample as a microbatch."""
        return self.batch(np.array([number]))

    def batch(self, numbers: Ints) -> Batch:
        """The samples ``numbers`` (``[batch]``) as one microbatch with a row each."""
        masked = self._masked(numbers, self._samples.pairs(numbers))
        return padded_batch(masked, slice(None), widest=self._sequence_length)

    def _cut(self, numbers: Ints) -> list[Batch]:
        """This replica's microbatches of a step, all made in one go: large arrays cost less than many."""
        pairs = self._samples.pairs(numbers)
        microbatches = self._cutting.cut(pairs.lengths)
        mine = np.concatenate(microbatches)
        if not len(mine):
            return [empty_batch(self._vocabulary) for _ in microbatches]
        masked = self._masked(numbers[mine], pairs.take(mine))
        cuts = np.cumsum([0, *map(len, microbatches)]).tolist()
        return [self._batch(masked, slice(*cut)) for cut in pairwise(cuts)]

    def _masked(self, numbers: Ints, pairs: Pairs) -> MaskedSamples:
        width = min(rounded(int(pairs.lengths.max())), self._sequence_length)
        rows = self._samples.rows(pairs, self._vocabulary, width=width)
        masked = mask_rows(rows, self._vocabulary, self._masking, seed=self._seed, numbers=numbers)
        return MaskedSamples(numbers, pairs, rows, masked)

    def _batch(self, masked: MaskedSamples, part: slice) -> Batch:
        if part.start == part.stop:
            return empty_batch(self._vocabulary)
        if self._cutting.packing == "packed":
            return packed_batch(masked, part, vocabulary=self._vocabulary)
        return padded_batch(masked, part, widest=self._sequence_length)
