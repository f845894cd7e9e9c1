"""From logits of tokens to a tag for each word, and how well entities are found, by seqeval."""

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.tasks.examples import WordsExample
from megatron_bert_tp.tasks.labels import OUTSIDE
from megatron_bert_tp.tasks.metrics import library

Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.floating]


class Words(Protocol):
    """What is read of the features."""

    @property
    def words(self) -> Ints | None:
        """``[tokens]`` number over all examples of the word that begins with a token; -1: none does."""


def decoded(
    examples: Sequence[WordsExample], table: Words, logits: Floats, labels: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """Tags of the words of all examples, from logits ``[tokens, labels]``.

    A word is tagged by its first token; one that the tokenizer leaves nothing of is in no entity.
    """
    assert table.words is not None
    lengths = [len(example.words) for example in examples]
    bounds = np.cumsum([0, *lengths]).tolist()
    tags = np.full(bounds[-1], OUTSIDE, dtype=object)
    begins_word = table.words >= 0
    tags[table.words[begins_word]] = np.array(labels, dtype=object)[logits[begins_word].argmax(axis=1)]
    return tuple(tuple(tags[start:stop].tolist()) for start, stop in pairwise(bounds))


def entity_metrics(expected: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """F1, precision and recall of whole entities of all sentences together, and the share of words tagged right.

    Entities are those of the CoNLL evaluation: I- after O or after another type begins one.  An entity is found
    if type, begin and end are right.  Without any entity all three are 0.
    """
    sides = [list(map(list, side)) for side in (expected, predicted)]
    precision, recall, f1, _ = library("seqeval.metrics.sequence_labeling").precision_recall_fscore_support(
        *sides, average="micro", zero_division=0
    )
    words = [list(chain.from_iterable(side)) for side in (expected, predicted)]
    accuracy = library("sklearn.metrics").accuracy_score(*words)
    return {"f1": float(f1), "precision": float(precision), "recall": float(recall), "accuracy": float(accuracy)}
