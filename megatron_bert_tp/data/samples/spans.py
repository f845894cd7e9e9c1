"""Runs of sentences that samples are made of."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap

from megatron_bert_tp.data.corpus.mapped import Corpus
from megatron_bert_tp.data.draws import Ints
from megatron_bert_tp.data.samples.span_rule import PairTask, SpanRule
from megatron_bert_tp.data.samples.span_walk import Block, walk
from megatron_bert_tp.data.samples.splits import DocumentSet, ListedDocuments
from megatron_bert_tp.errors import DataError


@dataclass(frozen=True)
class Spans:
    """The spans of one part of a corpus, in the order of the text; row i of the first four arrays is span i.

    Each array has the smallest integer type that holds twice its largest value.
    """

    first: npt.NDArray[Any]
    """``[spans]`` first sentence."""
    last: npt.NDArray[Any]
    """``[spans]`` last sentence, exclusive."""
    target: npt.NDArray[Any]
    """``[spans]`` tokens that the sample may have without special ones."""
    document: npt.NDArray[Any]
    """``[spans]`` index into ``documents``."""
    documents: npt.NDArray[Any]
    """``[documents]`` ascending numbers of the documents that have enough sentences: the usable ones."""
    folder: Path | None = None
    """Where the arrays are mapped from; None when they are in memory."""

    def __len__(self) -> int:
        return len(self.first)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, as for a worker process, mapped spans are their folder: the other process maps it too."""
        if self.folder is not None:
            return map_spans, (self.folder,)
        return Spans, tuple(getattr(self, name) for name in SPAN_COLUMNS)


SPAN_COLUMNS = tuple(field.name for field in fields(Spans) if field.name != "folder")


def map_spans(folder: Path) -> Spans:
    """Spans whose arrays are the files NAME.npy of a folder: read-only, not in memory until looked at."""
    columns: dict[str, Any] = {
        name: np.asarray(open_memmap(folder / f"{name}.npy", mode="r")) for name in SPAN_COLUMNS
    }
    return Spans(**columns, folder=folder)


def span_types(corpus: Corpus, rule: SpanRule) -> dict[str, np.dtype[Any]]:
    """Type of each array of `Spans`, little endian."""
    sentence, document = _integers(corpus.num_sentences), _integers(corpus.num_documents)
    target = _integers(rule.sequence_length)
    return {"first": sentence, "last": sentence, "target": target, "document": document, "documents": document}


def _integers(largest: int) -> np.dtype[Any]:
    return np.dtype(next(name for name in ("<i2", "<i4", "<i8") if 2 * largest <= np.iinfo(name).max))


def build_spans(
    corpus: Corpus,
    documents: Ints | DocumentSet,
    *,
    sequence_length: int,
    short_share: float,
    seed: int,
    pairs: PairTask = "nsp",
) -> Spans:
    """The spans of ``documents`` in memory, as `span_blocks` has them."""
    chosen = ListedDocuments(np.sort(documents)) if isinstance(documents, np.ndarray) else documents
    rule = SpanRule(sequence_length=sequence_length, short_share=short_share, seed=seed, pairs=pairs)
    return join_spans(span_blocks(corpus, chosen, rule))


class TooFewDocumentsError(DataError):
    """A part of a corpus yields no samples."""


def join_spans(blocks: Iterable[Spans]) -> Spans:
    """The spans of all blocks in one."""
    held = list(blocks)
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(block, name) for block in held]) for name in SPAN_COLUMNS
    }
    return Spans(**columns)


def span_blocks(corpus: Corpus, chosen: DocumentSet, rule: SpanRule) -> Iterator[Spans]:
    """Cut each of the documents ``chosen`` into spans that hold the target length, some documents at a time.

    A sentence joins a span until the target is reached and it has the least number of sentences: two, or one
    without pairs; a lone last sentence joins the span before it.  The target is ``sequence_length`` less the
    special tokens or, for a ``short_share`` of the spans, evenly drawn from 2 on by (seed, first sentence).
    After Megatron-LM's ``build_mapping``.  DataError, at the end, when too few documents have enough
    sentences.  ``document`` counts over all blocks; memory does not grow with the corpus.
    """
    types = span_types(corpus, rule)
    document, sentence, num_usable = 0, 0, 0
    while document < corpus.num_documents:
        block = Block.read(corpus, document, sentence, rule)
        usable = np.flatnonzero(np.diff(block.bounds) >= rule.need.sentences)
        usable = usable[chosen.contains(document + usable)]
        walked = walk(block, usable, rule)
        is_continued = int(sentence > corpus.documents[document])  # its first document has been counted
        document, sentence = block.next_document, block.next_sentence
        if block.is_cut and len(usable):
            # The end of its last span is beyond the block: the next one begins with that span.
            document, sentence = block.document, block.bounds[0] + walked.first[-1]
            walked = walked.take(slice(-1))
        columns = {
            "first": block.bounds[0] + walked.first,
            "last": block.bounds[0] + walked.last,
            "target": walked.target,
            "document": num_usable - is_continued + walked.document,
            "documents": block.document + usable[is_continued:],
        }
        num_usable += len(columns["documents"])
        yield Spans(**{name: column.astype(types[name]) for name, column in columns.items()})
    _check_enough(corpus, chosen, num_usable, rule)


def _check_enough(corpus: Corpus, chosen: DocumentSet, num_usable: int, rule: SpanRule) -> None:
    need = rule.need
    if num_usable >= need.documents:
        return
    raise TooFewDocumentsError(
        f"{corpus.prefix}: {need.name} needs {need.documents} or more documents of {need.sentences} or more "
        f"sentences, but of the {len(chosen)} documents of this part {num_usable} have so many (the corpus has "
        f"{corpus.num_documents} documents, {corpus.num_sentences} sentences, {corpus.num_tokens} tokens), so it "
        f"yields no samples: {need.way_out}"
    )
