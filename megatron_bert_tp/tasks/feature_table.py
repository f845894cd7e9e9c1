"""Samples as the model reads them, in flat arrays: a Python object for each token would not fit."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.data.draws import Ints
from megatron_bert_tp.tasks.task import Kind

Tokens = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]
Targets = npt.NDArray[np.int64] | npt.NDArray[np.float32] | npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class FeatureTable:
    """All samples of a part of the data; the tokens of row r are those from ``bounds[r]`` to ``bounds[r + 1]``."""

    kind: Kind
    ids: Tokens
    """``[tokens]`` int32, [CLS] and [SEP] included."""
    types: npt.NDArray[np.uint8]
    """``[tokens]`` uint8 token types."""
    bounds: Ints
    """``[rows + 1]`` int64."""
    examples: Ints
    """``[samples]`` int64: the example that a sample is of; for tags, the first one of several."""
    rows_per_sample: int = 1
    """The number of choices, or 1; sample s has the rows from ``s * rows_per_sample`` on."""
    labels: Targets | None = None
    """By kind; None where an example has no label.

    CLASS and CHOICE: ``[samples]`` int64.  CLASSES: ``[samples, classes]`` float32, 1 where a class holds.
    NUMBER: ``[samples]`` float64.  ANSWER: ``[samples, 2]`` int64, places in the row of the first and the last
    token of the answer, 0 and 0 ([CLS]) where it is not wholly in the window, -100 twice where nobody knows its
    place.  TAGS: ``[tokens]`` int64, -100 where a token is not the first one of a word.
    """
    spans: npt.NDArray[np.int32] | None = None
    """ANSWER: ``[tokens, 2]`` int32, characters of the context; -1 and -1 at the question, [CLS] and [SEP]."""
    words: Ints | None = None
    """TAGS: ``[tokens]`` int64, number of the word among the words of all examples; -1 but at first tokens."""
    truncated: int = 0
    """Samples that have lost tokens."""

    @property
    def num_samples(self) -> int:
        """Samples, of one or several rows each."""
        return len(self.examples)

    @property
    def lengths(self) -> Ints:
        """``[samples, rows_per_sample]`` tokens of each row."""
        return np.diff(self.bounds).reshape(self.num_samples, self.rows_per_sample)


def bounds_of(lengths: Ints) -> Ints:
    """Where rows of these lengths begin, one behind another, and where the last one ends: ``[rows + 1]``."""
    bounds = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=bounds[1:])
    return bounds
