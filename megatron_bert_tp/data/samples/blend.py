"""Which corpus of a blend a sample number stands for: closed forms over integers, without any index.

Corpora 0..k-1 together have ``N_k`` of the first n samples: ``N_K(n) = n`` for all K corpora, and
``N_k(n) = floor(N_{k+1}(n) * W_k / W_{k+1})`` below, where ``W_k`` is the sum of the first k weights.  Each
``N_k`` is a staircase whose steps are steps of ``N_{k+1}``, so every sample belongs to exactly one corpus, the
one whose step it is, and after any number of samples each corpus is less than K samples from its share.
"""

from collections.abc import Sequence

import numpy as np

from megatron_bert_tp.data.draws import Ints
from megatron_bert_tp.errors import DataError

_SCALE = 1 << 20  # what the weights add up to; their rounding is below one in a million
_LARGEST = 1 << 31  # the square of what weights add up to must fit 63 bits


def blend_weights(shares: Sequence[float] | None, num_spans: Sequence[int]) -> Ints:
    """``[corpora]`` whole numbers in proportion to ``shares``, or ``num_spans`` themselves without any.

    With ``num_spans``, one epoch of the blend is one epoch of each corpus.  DataError when a share is not
    above 0 or too small against the others.
    """
    if shares is None and sum(num_spans) < _LARGEST:
        return np.array(num_spans, dtype=np.int64)
    given = np.array(num_spans if shares is None else shares, dtype=np.float64)
    if len(given) != len(num_spans):
        raise DataError(
            f"data.weights has {len(given)} shares for the {len(num_spans)} corpora of data.corpus: "
            "give one for each, or null for as many samples as each has"
        )
    total = given.sum()
    if not (given.min() > 0 and given.min() * _SCALE >= total / 2 and np.isfinite(total)):
        raise DataError(
            f"data.weights {tuple(given.tolist())}: each share must be above 0, and at least one in "
            f"{2 * _SCALE} of their sum: take a corpus that is not to be read out of data.corpus"
        )
    weights: Ints = np.maximum(np.rint(given / total * _SCALE), 1).astype(np.int64)
    return weights


def counts_before(numbers: Ints, weights: Ints) -> Ints:
    """``[corpora + 1, samples]`` samples before each number that belong to the first k corpora."""
    sums = np.concatenate([[0], np.cumsum(weights)]).tolist()
    counts = np.zeros((len(weights) + 1, len(numbers)), dtype=np.int64)
    counts[-1] = numbers
    for k in range(len(weights) - 1, 0, -1):
        # Exact for any sample number: the whole rounds apart, and what is left fits 62 bits when multiplied.
        rounds, rest = np.divmod(counts[k + 1], sums[k + 1])
        counts[k] = rounds * sums[k] + rest * sums[k] // sums[k + 1]
    return counts


def places_in_blend(numbers: Ints, weights: Ints) -> tuple[Ints, Ints]:
    """``[samples]`` corpus of each sample number, and its number among the samples of that corpus."""
    before = counts_before(numbers, weights)
    has_stepped = counts_before(numbers + 1, weights) > before
    corpus = np.argmax(has_stepped[1:], axis=0)  # the staircases above the first that steps all step with it
    columns = np.arange(len(numbers))
    return corpus, before[corpus + 1, columns] - before[corpus, columns]


def samples_of_corpora(num_samples: int, weights: Ints) -> Ints:
    """``[corpora]`` how many of the first ``num_samples`` samples each corpus has."""
    return np.diff(counts_before(np.array([num_samples]), weights)[:, 0])
