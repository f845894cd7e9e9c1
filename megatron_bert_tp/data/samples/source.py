"""Samples of one part of one corpus or a blend, by number: the same number is the same sample everywhere."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from megatron_bert_tp.data.corpus.mapped import Corpus, check_digest
from megatron_bert_tp.data.draws import Ints
from megatron_bert_tp.data.samples.blend import blend_weights, places_in_blend, samples_of_corpora
from megatron_bert_tp.data.samples.index_cache import IndexCache
from megatron_bert_tp.data.samples.pairs import Pairs, Rows, choose_pairs, lay_out
from megatron_bert_tp.data.samples.sampler import SampleOrder
from megatron_bert_tp.data.samples.span_rule import PairTask, SpanRule
from megatron_bert_tp.data.samples.spans import Spans
from megatron_bert_tp.data.samples.splits import PartName, Shares, part_of
from megatron_bert_tp.data.tokenizer import Vocabulary


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """What samples are, and where their indexes are kept."""

    split: Shares
    sequence_length: int
    short_share: float
    pairs: PairTask
    seed: int
    weights: tuple[float, ...] | None = None
    """Shares of the corpora in the samples; None: as many as each has."""
    index_cache: Path | None = None
    """Folder for sample indexes; None: beside each corpus."""
    wait_seconds: float = 600.0
    """Longest wait for another process that builds an index."""


@dataclass(frozen=True)
class Epochs:
    """How far a run has come through one corpus."""

    prefix: Path
    samples: int
    """Samples taken from it."""
    samples_per_epoch: int

    @property
    def epochs(self) -> float:
        """Times that it has been read."""
        return self.samples / self.samples_per_epoch


class SampleSource:
    """Samples of one part of one or several corpora; sample numbers count over all epochs.

    A sample is a pure function of (seed, number).  It holds memory maps alone, and where it is sent to
    another process, those are made anew there.
    """

    def __init__(
        self, corpora: Sequence[Corpus], spans: Sequence[Spans], part: PartName, settings: SourceSettings
    ):
        self.corpora, self._spans = tuple(corpora), tuple(spans)
        self._part: PartName = part
        self._settings = settings
        sizes = [len(each) for each in self._spans]
        self._orders = [SampleOrder(size, settings.seed, corpus=n) for n, size in enumerate(sizes)]
        self._weights = blend_weights(settings.weights, sizes)

    @classmethod
    def open(
        cls, corpora: Sequence[Corpus], *, part: PartName, settings: SourceSettings, say: Callable[[str], None]
    ) -> "SampleSource":
        """Find or build the index of each corpus; ``say`` is told what is built, awaited or not used, and why.

        DataError when the .idx of one belongs to another corpus.
        """
        for corpus in corpora:
            check_digest(corpus)
        rule = SpanRule(
            sequence_length=settings.sequence_length,
            short_share=settings.short_share,
            seed=settings.seed,
            pairs=settings.pairs,
        )
        cache = IndexCache(folder=settings.index_cache, wait_seconds=settings.wait_seconds, say=say)
        spans = [cache.spans(corpus, part=part, split=settings.split, rule=rule) for corpus in corpora]
        return cls(corpora, spans, part, settings)

    @property
    def num_samples_per_epoch(self) -> int:
        """Samples that visit every span of every corpus once, were they all asked for equally often."""
        return sum(len(spans) for spans in self._spans)

    def epochs(self, samples_done: int) -> list[Epochs]:
        """How often the first ``samples_done`` samples have been through each corpus."""
        taken = samples_of_corpora(samples_done, self._weights).tolist()
        rows = zip(self.corpora, taken, self._spans, strict=True)
        return [Epochs(corpus.prefix, samples, len(spans)) for corpus, samples, spans in rows]

    def pairs(self, numbers: Ints) -> Pairs:
        """Where the samples ``numbers`` (``[samples]``) stand, in that order."""
        if len(self.corpora) == 1:
            return self._pairs_of(0, numbers, numbers)
        corpus, own = places_in_blend(numbers, self._weights)
        rows = [np.flatnonzero(corpus == n) for n in range(len(self.corpora))]
        parts = [self._pairs_of(n, own[mine], numbers[mine]) for n, mine in enumerate(rows) if len(mine)]
        return _merged(parts, rows)

    def rows(self, pairs: Pairs, vocabulary: Vocabulary, *, width: int) -> Rows:
        """The tokens of ``pairs`` laid out as rows of ``width``, in their order."""
        if len(self.corpora) == 1:
            return lay_out(self.corpora[0].tokens, pairs, vocabulary, width=width)
        rows = [np.flatnonzero(pairs.corpus == n) for n in range(len(self.corpora))]
        parts = [
            lay_out(self.corpora[n].tokens, pairs.take(mine), vocabulary, width=width)
            for n, mine in enumerate(rows)
            if len(mine)
        ]
        return _merged(parts, rows)

    def documents(self, corpus: int) -> Ints:
        """Ascending numbers of the documents of this part in one of the corpora; computed, not kept."""
        return part_of(self.corpora[corpus].num_documents, self._settings.split, self._part).documents()

    def _pairs_of(self, corpus: int, own: Ints, numbers: Ints) -> Pairs:
        """Pairs of the samples ``own`` of one corpus; their draws are those of their ``numbers`` in the blend."""
        chosen = self._orders[corpus].spans(own)
        pairs = choose_pairs(
            self.corpora[corpus],
            self._spans[corpus],
            chosen,
            seed=self._settings.seed,
            numbers=numbers,
            task=self._settings.pairs,
        )
        return replace(pairs, corpus=np.full(len(numbers), corpus))


_Arrays = TypeVar("_Arrays", Pairs, Rows)


def _merged(parts: Sequence[_Arrays], rows: Sequence[Ints]) -> _Arrays:
    """One dataclass of arrays whose row ``rows[n][i]`` is row i of part n."""
    order = np.argsort(np.concatenate(rows))
    names = [field.name for field in fields(parts[0])]
    columns = {name: np.concatenate([getattr(part, name) for part in parts])[order] for name in names}
    return replace(parts[0], **columns)
