"""Tags of words, and entities as the CoNLL evaluation counts them, by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_bert_tp.tasks.examples import WordsExample
from megatron_bert_tp.tasks.tags import decoded, entity_metrics

LABELS = ("O", "B-x", "I-x")


def counted(found: int, predicted: int, expected: int) -> dict[str, float]:
    """Precision, recall and F1 of these numbers of entities; 0 without any."""
    return {
        "precision": found / max(1, predicted),
        "recall": found / max(1, expected),
        "f1": 2 * found / max(1, predicted + expected),
    }


@pytest.mark.parametrize(
    ("expected", "predicted", "entities"),
    [
        # Right ones: (found, predicted, expected).
        ("B-x I-x O B-y", "B-x I-x O B-y", (2, 2, 2)),
        # Two entities of a type side by side are not one.
        ("B-x B-x", "B-x I-x", (0, 1, 2)),
        ("B-x I-x", "B-x B-x", (0, 2, 1)),
        ("B-x B-x", "B-x B-x", (2, 2, 2)),
        # The type must be right, and both ends.
        ("B-x I-x O", "B-y I-y O", (0, 1, 1)),
        ("B-x I-x I-x", "B-x I-x O", (0, 1, 1)),
        ("B-x I-x I-x", "O B-x I-x", (0, 1, 1)),
        ("B-x I-x I-x", "B-x O B-x", (0, 2, 1)),
        # I- begins an entity after O, after another type, and at the beginning.
        ("O B-x I-x", "O I-x I-x", (1, 1, 1)),
        ("B-x B-y I-y", "B-x I-y I-y", (2, 2, 2)),
        ("B-x I-x", "I-x I-x", (1, 1, 1)),
        ("B-x I-x", "B-x I-y", (0, 2, 1)),
        # Entities at the end of a sentence do not run on into the next one.
        ("O B-x | B-x O", "O B-x | B-x O", (2, 2, 2)),
        ("O B-x | I-x O", "O B-x | B-x O", (2, 2, 2)),
        # Entities of all types count together.
        ("B-x O B-y", "B-x O B-x", (1, 2, 2)),
        # All or nothing.
        ("O O", "O O", (0, 0, 0)),
        ("O O", "B-x O", (0, 1, 0)),
        ("B-x O", "O O", (0, 0, 1)),
    ],
)
def test_entities_are_counted_as_the_conll_evaluation_does(expected, predicted, entities):
    sides = [[sentence.split() for sentence in side.split("|")] for side in (expected, predicted)]
    words = [[tag for sentence in side for tag in sentence] for side in sides]
    right = sum(one == other for one, other in zip(*words, strict=True))
    found = entity_metrics(*sides)
    assert found == pytest.approx({**counted(*entities), "accuracy": right / len(words[0])}, rel=1e-15)


def test_tags_come_from_the_first_tokens_of_words_wherever_these_are():
    examples = [
        WordsExample(id=str(number), place="", words=tuple("w" * size)) for number, size in enumerate((2, 1, 3))
    ]
    # Words 0 to 5; word 2, all of the second sentence, and word 4 have no token, and the pieces come out of order.
    words = np.array([-1, 3, -1, 5, -1, 0, 1, -1])
    best = np.array([1, 2, 1, 1, 1, 1, 2, 1])
    found = decoded(examples, SimpleNamespace(words=words), np.eye(3)[best], LABELS)
    assert found == (("B-x", "I-x"), ("O",), ("I-x", "O", "B-x"))
