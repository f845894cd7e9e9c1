"""Samples padded into microbatches, as torch tensors."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_bert_tp.config.schema import MaskingConfig
from megatron_bert_tp.data.corpus import Corpus
from megatron_bert_tp.data.draws import Ints
from megatron_bert_tp.data.masking import MaskedRows, mask_rows
from megatron_bert_tp.data.pairs import Pairs, Rows, choose_pairs, lay_out
from megatron_bert_tp.data.sampler import BatchShare, SampleOrder
from megatron_bert_tp.data.spans import build_spans
from megatron_bert_tp.data.tokenizer import Vocabulary
from megatron_bert_tp.parallel.cross_entropy import IGNORED

_WIDTH_MULTIPLE = 8
_MASKED_MULTIPLE = 64


@dataclass(frozen=True)
class Batch:
    """One microbatch of one replica.

    ``sequence`` is the longest sample rounded up to a multiple of 8, at most the settings' sequence
    length; ``masked`` is the number of masked tokens rounded up to a multiple of 64, at least 64.
    """

    input_ids: Tensor
    """``[batch, sequence]`` int64, padded with [PAD]."""
    token_type_ids: Tensor
    """``[batch, sequence]`` int64: 0 in [CLS] A [SEP] and at the padding, 1 in B [SEP]."""
    attention_mask: Tensor | None
    """``[batch, sequence]`` bool, True at real tokens; None when nothing is padded."""
    sample_numbers: tuple[int, ...]
    """``[batch]`` sample numbers counted over all epochs; dropout bits are drawn from them."""
    masked_positions: Tensor
    """``[masked]`` int64, flat index into batch * sequence; 0 at the padding."""
    masked_labels: Tensor
    """``[masked]`` int64 token ids to restore; -100 at the padding."""
    next_sentence_labels: Tensor
    """``[batch]`` int64: 0 when B follows A, 1 when B is from another document."""
    num_tokens: int
    """Real (not padding) tokens."""

    def to(self, device: torch.device) -> "Batch":
        """The same microbatch with all tensors on ``device``."""
        mask = self.attention_mask
        return Batch(
            input_ids=self.input_ids.to(device),
            token_type_ids=self.token_type_ids.to(device),
            attention_mask=None if mask is None else mask.to(device),
            sample_numbers=self.sample_numbers,
            masked_positions=self.masked_positions.to(device),
            masked_labels=self.masked_labels.to(device),
            next_sentence_labels=self.next_sentence_labels.to(device),
            num_tokens=self.num_tokens,
        )


class PretrainingBatches:
    """Microbatches for masked language modelling and next sentence prediction over one part of a corpus.

    A sample is a pure function of (seed, sample number), so that every tensor and pipeline rank of a
    replica makes the same batch by itself.  Sample numbers count over all epochs.
    """

    def __init__(
        self,
        corpus: Corpus,
        vocabulary: Vocabulary,
        documents: Ints,
        *,
        sequence_length: int,
        short_share: float,
        masking: MaskingConfig,
        seed: int,
        share: BatchShare,
    ):
        self._corpus, self._vocabulary = corpus, vocabulary
        self._sequence_length, self._masking, self._seed, self._share = sequence_length, masking, seed, share
        self._spans = build_spans(
            corpus, documents, sequence_length=sequence_length, short_share=short_share, seed=seed
        )
        self._order = SampleOrder(len(self._spans), seed)

    @property
    def num_samples_per_epoch(self) -> int:
        """Samples that visit every span of the documents once."""
        return len(self._spans)

    def take(self, samples_done: int) -> list[Batch]:
        """Microbatches of this replica in the step that follows ``samples_done`` samples."""
        return self._batches(self._share.numbers_from(samples_done))

    def evaluation(self, num_samples: int) -> list[Batch]:
        """This replica's microbatches of the first samples, at most one epoch; always the same, masks included.

        The last one may be short; a replica may have none where there are fewer microbatches than replicas.
        """
        return self._batches(self._share.numbers_of_evaluation(min(num_samples, self.num_samples_per_epoch)))

    def sample(self, number: int) -> Batch:
        """One sample as a microbatch."""
        return self.batch(np.array([number]))

    def batch(self, numbers: Ints) -> Batch:
        """The samples ``numbers`` (``[batch]``) as one microbatch."""
        return self._batches([numbers])[0]

    def pairs(self, numbers: Ints) -> Pairs:
        """Where the samples ``numbers`` (``[batch]``) stand in the corpus."""
        chosen = self._order.spans(numbers)
        return choose_pairs(self._corpus, self._spans, chosen, seed=self._seed, numbers=numbers)

    def _batches(self, microbatches: list[Ints]) -> list[Batch]:
        """All microbatches in one go: whole-array operations cost less the more rows they work on."""
        if not microbatches:
            return []
        numbers = np.concatenate(microbatches)
        pairs = self.pairs(numbers)
        rows = lay_out(self._corpus.tokens, pairs, self._vocabulary, width=self._width(pairs.lengths))
        masked = mask_rows(rows, self._vocabulary, self._masking, seed=self._seed, numbers=numbers)
        cuts = np.cumsum([0, *map(len, microbatches)]).tolist()
        return [self._batch(numbers, pairs, rows, masked, slice(*cut)) for cut in pairwise(cuts)]

    def _batch(self, numbers: Ints, pairs: Pairs, rows: Rows, masked: MaskedRows, part: slice) -> Batch:
        lengths = pairs.lengths[part]
        width = self._width(lengths)
        is_masked = masked.is_masked[part, :width]
        positions = np.flatnonzero(is_masked)
        return Batch(
            input_ids=_tensor(masked.ids[part, :width]),
            token_type_ids=_tensor(rows.types[part, :width]),
            attention_mask=None if lengths.min() == width else _tensor(np.arange(width) < lengths[:, None]),
            sample_numbers=tuple(numbers[part].tolist()),
            masked_positions=_tensor(_pad(positions, 0)),
            masked_labels=_tensor(_pad(masked.labels[part, :width][is_masked], IGNORED)),
            next_sentence_labels=_tensor(pairs.is_random[part].astype(np.int64)),
            num_tokens=int(lengths.sum()),
        )

    def _width(self, lengths: Ints) -> int:
        longest = int(lengths.max())
        return min(-(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE, self._sequence_length)


def _pad(values: Ints, padding: int) -> Ints:
    """``values`` and then ``padding`` up to a multiple of 64, at least 64."""
    padded = np.full(max(-(-len(values) // _MASKED_MULTIPLE), 1) * _MASKED_MULTIPLE, padding)
    padded[: len(values)] = values
    return padded


def _tensor(values: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
