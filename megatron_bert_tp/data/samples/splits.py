"""Documents to training, validation and test parts."""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.data.draws import Ints, Purpose, streams
from megatron_bert_tp.data.samples.shuffle import permuted
from megatron_bert_tp.errors import DataError

PartName = Literal["training", "validation", "test"]
PART_NAMES: tuple[PartName, ...] = ("training", "validation", "test")
Shares = tuple[float, float, float]

_BLOCK = 1 << 20  # documents


class DocumentSet(Protocol):
    """Some documents of a corpus."""

    def __len__(self) -> int: ...

    def contains(self, documents: Ints) -> npt.NDArray[np.bool_]:
        """``[documents]`` True where the document is one of these."""


@dataclass(frozen=True)
class Part:
    """The documents of one part of a corpus: those that a permutation puts at ``places``.

    Whether a document belongs to it is computed, so a part takes no memory.
    """

    num_documents: int
    """Documents of the whole corpus."""
    places: range

    def __len__(self) -> int:
        return len(self.places)

    def contains(self, documents: Ints) -> npt.NDArray[np.bool_]:
        """``[documents]`` True where the document is in this part."""
        if len(self.places) in (0, self.num_documents):
            return np.full(documents.shape, len(self.places) > 0)
        place = permuted(documents, self.num_documents, streams(0, Purpose.SPLIT, np.zeros(1, dtype=np.int64)))
        is_here: npt.NDArray[np.bool_] = (place >= self.places.start) & (place < self.places.stop)
        return is_here

    def documents(self) -> Ints:
        """Ascending numbers of the documents; as many numbers in memory."""
        blocks = range(0, self.num_documents, _BLOCK)
        numbers = [np.arange(first, min(first + _BLOCK, self.num_documents)) for first in blocks]
        return np.concatenate([block[self.contains(block)] for block in numbers])


@dataclass(frozen=True)
class ListedDocuments:
    """The documents of a list."""

    numbers: Ints
    """``[documents]`` ascending."""

    def __len__(self) -> int:
        return len(self.numbers)

    def contains(self, documents: Ints) -> npt.NDArray[np.bool_]:
        """``[documents]`` True where the document is in the list."""
        return np.isin(documents, self.numbers)


def part_of(num_documents: int, shares: Shares, part: PartName) -> Part:
    """One part of a corpus of ``num_documents``; which documents are in it depends on their number alone.

    Each document is in exactly one part.  A part with a positive share gets at least one document; DataError
    when there are too few for that.
    """
    wanted = sum(share > 0 for share in shares)
    if min(shares) < 0 or wanted == 0 or num_documents < wanted:
        raise DataError(
            f"data.split {shares} needs shares >= 0 with one above 0, and a document for each of the {wanted} "
            f"parts; the corpus has {num_documents} documents: set the share of a part to 0 or give more documents"
        )
    ends = np.cumsum(_counts(num_documents, shares)).tolist()
    number = PART_NAMES.index(part)
    return Part(num_documents, range([0, *ends][number], ends[number]))


def split_documents(num_documents: int, shares: Shares) -> tuple[Ints, Ints, Ints]:
    """Ascending document numbers of the training, validation and test part, as `part_of` has them."""
    training, validation, test = (part_of(num_documents, shares, part).documents() for part in PART_NAMES)
    return training, validation, test


def _counts(num_documents: int, shares: Shares) -> Ints:
    """Documents of each part: largest remainders, but never 0 for a positive share."""
    exact = np.array(shares) / sum(shares) * num_documents
    counts = np.floor(exact).astype(np.int64)
    largest_remainders = np.argsort(counts - exact, kind="stable")
    counts[largest_remainders[: num_documents - counts.sum()]] += 1
    for part in np.flatnonzero((counts == 0) & (np.array(shares) > 0)):
        counts[np.argmax(counts)] -= 1
        counts[part] += 1
    return counts
