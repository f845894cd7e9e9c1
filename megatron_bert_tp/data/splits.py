"""Documents to training, validation and test parts."""

import numpy as np

from megatron_bert_tp.data.draws import Ints, Purpose, draw, streams
from megatron_bert_tp.errors import DataError


def split_documents(num_documents: int, shares: tuple[float, float, float]) -> tuple[Ints, Ints, Ints]:
    """Ascending document numbers of the training, validation and test part.

    Each document is in exactly one part, chosen by a permutation that depends on ``num_documents`` alone.
    A part with a positive share gets at least one document; DataError when there are too few for that.
    """
    wanted = sum(share > 0 for share in shares)
    if min(shares) < 0 or wanted == 0 or num_documents < wanted:
        raise DataError(
            f"data.split {shares} needs shares >= 0 with one above 0, and a document for each of the {wanted} "
            f"parts; the corpus has {num_documents} documents: set the share of a part to 0 or give more documents"
        )
    scores = draw(streams(0, Purpose.SPLIT, np.zeros(1, dtype=np.int64)), np.arange(num_documents))
    order = np.argsort(scores, kind="stable")
    training, validation, test = np.split(order, np.cumsum(_counts(num_documents, shares))[:2])
    return np.sort(training), np.sort(validation), np.sort(test)


def _counts(num_documents: int, shares: tuple[float, float, float]) -> Ints:
    """Documents of each part: largest remainders, but never 0 for a positive share."""
    exact = np.array(shares) / sum(shares) * num_documents
    counts = np.floor(exact).astype(np.int64)
    largest_remainders = np.argsort(counts - exact, kind="stable")
    counts[largest_remainders[: num_documents - counts.sum()]] += 1
    for part in np.flatnonzero((counts == 0) & (np.array(shares) > 0)):
        counts[np.argmax(counts)] -= 1
        counts[part] += 1
    return counts
