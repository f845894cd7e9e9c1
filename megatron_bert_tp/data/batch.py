"""One microbatch as torch tensors, and how it is made of masked samples."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_bert_tp.data.draws import Ints
from megatron_bert_tp.data.packing import WIDTH_MULTIPLE, rounded
from megatron_bert_tp.data.samples.masking import MaskedRows
from megatron_bert_tp.data.samples.pairs import Pairs, Rows
from megatron_bert_tp.data.tensors import Tensors
from megatron_bert_tp.data.tokenizer import Vocabulary
from megatron_bert_tp.parallel.cross_entropy import IGNORED

_MASKED_MULTIPLE = 64


@dataclass(frozen=True)
class Batch(Tensors):
    """One microbatch of one replica.

    Each row is a sample, as wide as the longest rounded up to a multiple of 8, at most the settings' sequence
    length; or there is one row in which the samples stand one behind another, rounded up to a multiple of 8.
    ``masked`` is the number of masked tokens rounded up to a multiple of 64, at least 64.  A microbatch without
    samples is a row of 8 times [PAD] with nothing to predict.
    """

    input_ids: Tensor
    """``[batch, sequence]`` int64, padded with [PAD]."""
    token_type_ids: Tensor
    """``[batch, sequence]`` int64: 0 in [CLS] A [SEP] and at the padding, 1 in B [SEP]."""
    attention_mask: Tensor | None
    """``[batch, sequence]`` bool, True at real tokens; None when nothing is padded, or samples are packed."""
    sample_numbers: tuple[int, ...]
    """``[samples]`` sample numbers counted over all epochs; dropout bits are drawn from them."""
    masked_positions: Tensor
    """``[masked]`` int64, flat index into batch * sequence; 0 at the padding."""
    masked_labels: Tensor
    """``[masked]`` int64 token ids to restore; -100 at the padding."""
    next_sentence_labels: Tensor
    """``[samples]`` int64: 0 when B follows A, 1 when it does not, -100 without a pair."""
    num_tokens: int
    """Real (not padding) tokens."""
    packed_lengths: tuple[int, ...] | None = None
    """``[samples]`` tokens of the samples in the only row; None where each row is a sample."""
    position_ids: Tensor | None = None
    """``[1, sequence]`` int64 place of each token in its sample; None where each row is a sample."""


@dataclass(frozen=True)
class MaskedSamples:
    """Samples as numpy arrays, padded to one width; row i of every array is sample i."""

    numbers: Ints
    """``[samples]`` sample numbers counted over all epochs."""
    pairs: Pairs
    rows: Rows
    masked: MaskedRows


def padded_batch(samples: MaskedSamples, part: slice, *, widest: int) -> Batch:
    """The samples of ``part`` in a row each, at most ``widest`` wide."""
    lengths = samples.pairs.lengths[part]
    width = min(rounded(int(lengths.max())), widest)
    is_masked = samples.masked.is_masked[part, :width]
    return Batch(
        input_ids=_tensor(samples.masked.ids[part, :width]),
        token_type_ids=_tensor(samples.rows.types[part, :width]),
        attention_mask=None if lengths.min() == width else _tensor(np.arange(width) < lengths[:, None]),
        sample_numbers=tuple(samples.numbers[part].tolist()),
        masked_positions=_tensor(_filled(np.flatnonzero(is_masked), _MASKED_MULTIPLE, 0)),
        masked_labels=_tensor(
            _filled(samples.masked.labels[part, :width][is_masked], _MASKED_MULTIPLE, IGNORED)
        ),
        next_sentence_labels=_tensor(samples.pairs.labels[part]),
        num_tokens=int(lengths.sum()),
    )


def packed_batch(samples: MaskedSamples, part: slice, *, vocabulary: Vocabulary) -> Batch:
    """The samples of ``part`` one behind another in one row."""
    lengths = samples.pairs.lengths[part]
    width = samples.rows.ids.shape[1]
    is_real = np.arange(width) < lengths[:, None]
    is_masked = samples.masked.is_masked[part][is_real]

    def row(values: npt.NDArray[Any], padding: int) -> Tensor:
        return _tensor(_filled(values[is_real], WIDTH_MULTIPLE, padding)[None])

    return Batch(
        input_ids=row(samples.masked.ids[part], vocabulary.pad_id),
        token_type_ids=row(samples.rows.types[part], 0),
        attention_mask=None,
        sample_numbers=tuple(samples.numbers[part].tolist()),
        masked_positions=_tensor(_filled(np.flatnonzero(is_masked), _MASKED_MULTIPLE, 0)),
        masked_labels=_tensor(
            _filled(samples.masked.labels[part][is_real][is_masked], _MASKED_MULTIPLE, IGNORED)
        ),
        next_sentence_labels=_tensor(samples.pairs.labels[part]),
        num_tokens=int(lengths.sum()),
        packed_lengths=tuple(lengths.tolist()),
        position_ids=row(np.broadcast_to(np.arange(width), is_real.shape), 0),
    )


def empty_batch(vocabulary: Vocabulary) -> Batch:
    """A microbatch without samples: something to compute, and nothing to learn from it."""
    none = np.array([], dtype=np.int64)
    ids = torch.full((1, WIDTH_MULTIPLE), vocabulary.pad_id)
    return Batch(
        input_ids=ids,
        token_type_ids=torch.zeros_like(ids),
        attention_mask=None,
        sample_numbers=(0,),
        masked_positions=_tensor(_filled(none, _MASKED_MULTIPLE, 0)),
        masked_labels=_tensor(_filled(none, _MASKED_MULTIPLE, IGNORED)),
        next_sentence_labels=torch.tensor([IGNORED]),
        num_tokens=0,
    )


def _filled(values: npt.NDArray[Any], multiple: int, padding: int) -> Ints:
    """``values`` and then ``padding`` up to a multiple of ``multiple``, at least one."""
    filled = np.full(max(-(-len(values) // multiple), 1) * multiple, padding, dtype=np.int64)
    filled[: len(values)] = values
    return filled


def _tensor(values: npt.NDArray[Any]) -> Tensor:
    # int64 whatever the arrays are: torch takes indices of no other kind everywhere.
    return torch.from_numpy(np.ascontiguousarray(values, dtype=None if values.dtype == bool else np.int64))
