"""Samples of a task to microbatches, for training and, each sample exactly once, for evaluation."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_bert_tp.data.draws import Ints
from megatron_bert_tp.data.packing import WIDTH_MULTIPLE, Cutting, rounded
from megatron_bert_tp.data.samples.sampler import SampleOrder
from megatron_bert_tp.data.tensors import Tensors
from megatron_bert_tp.errors import ConfigError
from megatron_bert_tp.parallel.cross_entropy import IGNORED
from megatron_bert_tp.tasks.feature_table import FeatureTable, Flags, bounds_of
from megatron_bert_tp.tasks.task import Kind

_SAMPLES_AT_ONCE = 8192  # of an evaluation in bins or packed: bins of first fit take time by their number


@dataclass(frozen=True, kw_only=True)
class TaskBatch(Tensors):
    """One microbatch of one replica; it fits `model.stage.StageInput` and the terms of `objectives.tasks`.

    Each row is a text, a pair, a window or a choice, as wide as the longest rounded up to a multiple of 8, at most
    the settings' sequence length; or there is one row in which they stand one behind another, rounded up to a
    multiple of 8.  A microbatch without samples has as many rows as one sample, of 8 times [PAD], and nothing to
    learn: its ``labels`` are -100 where they are classes, and have no row where they are numbers.
    """

    input_ids: Tensor
    """``[rows, width]`` int64, padded with [PAD]."""
    token_type_ids: Tensor
    """``[rows, width]`` int64, 0 at the padding."""
    attention_mask: Tensor | None
    """``[rows, width]`` bool, True at real tokens; None when nothing is padded, or rows are packed."""
    sample_numbers: tuple[int, ...]
    """``[rows]``, packed ones too: sample number over all epochs x choices + choice; dropout is drawn by it."""
    num_tokens: int
    """Real (not padding) tokens."""
    packed_lengths: tuple[int, ...] | None = None
    """``[rows]`` tokens of what stands in the only row; None where rows are not packed."""
    position_ids: Tensor | None = None
    """``[1, width]`` int64 place of each token in its text, where rows are packed."""
    labels: Tensor | None = None
    """CLASS and CHOICE ``[samples]`` int64; CLASSES ``[samples, classes]`` float32; NUMBER ``[samples]`` float64.

    TAGS ``[rows, width]`` int64, -100 but at the first tokens of words.  None for answers, and without labels.
    """
    start_positions: Tensor | None = None
    """ANSWER ``[samples]`` int64, place in its window (packed ones too) of the first token of the answer."""
    end_positions: Tensor | None = None
    """ANSWER ``[samples]`` int64, place of the last token."""


class TaskBatches:
    """Microbatches of one replica of the samples of ``table``.

    Training visits all samples once an epoch, in an order that is a pure function of (seed, number of samples);
    sample numbers count over all epochs, and each step has ``global_batch`` samples.
    All ranks of a replica make the same microbatches by themselves.
    """

    def __init__(
        self,
        table: FeatureTable,
        pad_id: int,
        *,
        sequence_length: int,
        seed: int,
        global_batch: int,
        cutting: Cutting,
    ):
        """ConfigError when a microbatch of ``cutting`` may be too small for all the choices of a sample."""
        self._table, self._pad_id, self._sequence_length = table, pad_id, sequence_length
        self._global_batch, self._cutting = global_batch, cutting
        self._order = SampleOrder(table.num_samples, seed)
        _check_capacity(cutting, table.rows_per_sample, sequence_length)

    @property
    def num_samples_per_epoch(self) -> int:
        """Samples of the table."""
        return self._table.num_samples

    def take(self, samples_done: int) -> list[TaskBatch]:
        """Microbatches of this replica in the step that follows ``samples_done`` samples."""
        numbers = np.arange(samples_done, samples_done + self._global_batch)
        samples = self._order.spans(numbers)
        microbatches = _cut(self._table, samples, self._cutting)
        return [self.batch(samples[places], numbers[places]) for places in microbatches]

    def evaluation(self) -> list[TaskBatch]:
        """This replica's microbatches of all samples, those of `evaluation_samples`; sample numbers are places."""
        mine = self.evaluation_samples(self._cutting.data_rank)
        return [self.batch(samples, samples) for samples in mine]

    def evaluation_samples(self, data_rank: int) -> list[Ints]:
        """Samples of each microbatch that a replica evaluates, so that outputs can be put in order.

        Every sample is in one microbatch of one replica; all replicas have as many microbatches, some of which
        may be empty.  Samples of like lengths are together, so that little is padded.
        """
        cutting, everything = replace(self._cutting, data_rank=data_rank), np.arange(self._table.num_samples)
        if cutting.packing == "none":
            by_length = np.argsort(-self._table.lengths.max(axis=1, initial=0), kind="stable")
            return [by_length[places] for places in _cut(self._table, by_length, cutting)]
        parts = np.split(everything, range(_SAMPLES_AT_ONCE, len(everything), _SAMPLES_AT_ONCE))
        return [part[places] for part in parts for places in _cut(self._table, part, cutting)]

    def batch(self, samples: Ints, numbers: Ints) -> TaskBatch:
        """The samples of the table as one microbatch; ``numbers`` are theirs over all epochs."""
        if not len(samples):
            return _empty_batch(self._table, self._pad_id)
        choices = np.arange(self._table.rows_per_sample)
        rows = (samples[:, None] * len(choices) + choices).ravel()
        lengths = np.diff(self._table.bounds)[rows]
        is_packed = self._cutting.packing == "packed"
        is_real = _packed_places(lengths) if is_packed else _padded_places(lengths, self._sequence_length)
        firsts = bounds_of(lengths)[:-1]
        positions = np.arange(int(lengths.sum())) - np.repeat(firsts, lengths)
        tokens = positions + np.repeat(self._table.bounds[rows], lengths)
        return TaskBatch(
            input_ids=_laid_out(self._table.ids[tokens], is_real, self._pad_id),
            token_type_ids=_laid_out(self._table.types[tokens], is_real, 0),
            attention_mask=None if is_packed or is_real.all() else torch.from_numpy(is_real),
            sample_numbers=tuple((numbers[:, None] * len(choices) + choices).ravel().tolist()),
            num_tokens=len(tokens),
            packed_lengths=tuple(lengths.tolist()) if is_packed else None,
            position_ids=_laid_out(positions, is_real, 0) if is_packed else None,
            **_targets(self._table, samples, tokens, is_real),
        )


def _check_capacity(cutting: Cutting, num_choices: int, sequence_length: int) -> None:
    least = num_choices * rounded(sequence_length)
    if cutting.packing == "none" or cutting.size >= least:
        return
    raise ConfigError(
        f"parallel.microbatch_tokens ({cutting.size}) must be at least {least}, where parallel.packing is "
        f"{cutting.packing}: {num_choices} rows of a sample x data.sequence_length ({sequence_length}) rounded "
        f"up to 8; use parallel.microbatch_tokens: {least} or more, or a smaller data.sequence_length"
    )


def _cut(table: FeatureTable, samples: Ints, cutting: Cutting) -> list[Ints]:
    """Places in ``samples`` of each of a replica's microbatches.

    A sample of several rows costs in bins so many times its longest row, which is a bin so many times smaller.
    """
    lengths = table.lengths[samples]
    if cutting.packing == "packed":
        return cutting.cut(lengths.sum(axis=1))
    if cutting.packing == "bins":
        cutting = replace(cutting, size=cutting.size // table.rows_per_sample)
    return cutting.cut(lengths.max(axis=1, initial=0))


def _padded_places(lengths: Ints, widest: int) -> Flags:
    """``[rows, width]``, True where a row has tokens."""
    places: Flags = np.arange(min(rounded(int(lengths.max())), widest)) < lengths[:, None]
    return places


def _packed_places(lengths: Ints) -> Flags:
    """``[1, width]``, True where the only row has tokens."""
    num_tokens = int(lengths.sum())
    return np.arange(rounded(num_tokens))[None] < num_tokens


def _laid_out(values: npt.NDArray[Any], is_real: Flags, padding: int) -> Tensor:
    """``values`` at the real places, one behind another, and ``padding`` elsewhere; int64."""
    filled = np.full(is_real.shape, padding, dtype=np.int64)
    filled[is_real] = values
    return torch.from_numpy(filled)


def _targets(table: FeatureTable, samples: Ints, tokens: Ints, is_real: Flags) -> dict[str, Any]:
    """Fields of a microbatch with what is to be learned, empty without labels."""
    if table.labels is None:
        return {}
    if table.kind is Kind.TAGS:
        return {"labels": _laid_out(table.labels[tokens], is_real, IGNORED)}
    return _named_targets(table.kind, torch.from_numpy(table.labels[samples]))


def _named_targets(kind: Kind, labels: Tensor) -> dict[str, Any]:
    if kind is Kind.ANSWER:
        starts, ends = labels.unbind(1)
        return {"start_positions": starts.contiguous(), "end_positions": ends.contiguous()}
    return {"labels": labels}


def _empty_batch(table: FeatureTable, pad_id: int) -> TaskBatch:
    """A microbatch without samples: something to compute, and nothing to learn from it."""
    is_real = np.zeros((table.rows_per_sample, WIDTH_MULTIPLE), dtype=bool)
    nothing = np.zeros(0, dtype=np.int64)
    return TaskBatch(
        input_ids=_laid_out(nothing, is_real, pad_id),
        token_type_ids=_laid_out(nothing, is_real, 0),
        attention_mask=None,
        sample_numbers=(0,) * table.rows_per_sample,
        num_tokens=0,
        **_nothing_to_learn(table, is_real),
    )


def _nothing_to_learn(table: FeatureTable, is_real: Flags) -> dict[str, Any]:
    if table.labels is None:
        return {}
    if table.kind is Kind.TAGS:
        return {"labels": _laid_out(np.zeros(0, dtype=np.int64), is_real, IGNORED)}
    if table.kind in (Kind.NUMBER, Kind.CLASSES):
        return {"labels": torch.from_numpy(table.labels[:0])}
    return _named_targets(table.kind, torch.full((1, *table.labels.shape[1:]), IGNORED))
