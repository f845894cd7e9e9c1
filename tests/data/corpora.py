"""Corpora whose every token tells where it stands, and batches over a whole corpus."""

import numpy as np

from megatron_bert_tp.config.schema import MaskingConfig
from megatron_bert_tp.data.batches import Batch, PretrainingBatches
from megatron_bert_tp.data.corpus import Corpus
from megatron_bert_tp.data.sampler import BatchShare
from megatron_bert_tp.data.tokenizer import Vocabulary

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
FIRST = len(SPECIAL)


def numbered_vocabulary(size: int = 60000) -> Vocabulary:
    """Special tokens 0..4, then words, of which every fourth id is a piece that goes on with a word."""
    return Vocabulary((*SPECIAL, *(f"##{n}" if n % 4 == 0 else f"{n}" for n in range(FIRST, size))), 0, 1, 2, 3, 4)


def numbered_documents(shape: list[list[int]]) -> list[list[list[int]]]:
    """Documents with these sentence lengths, in which token k of the corpus has the id 5 + k."""
    ids = iter(range(FIRST, 60000))
    return [[[next(ids) for _ in range(length)] for length in lengths] for lengths in shape]


def random_shape(num_documents: int, seed: int = 0, *, sentences: tuple[int, int] = (1, 30)) -> list[list[int]]:
    """Sentence lengths 1..39 of documents with so many sentences."""
    draws = np.random.default_rng(seed)
    return [draws.integers(1, 40, size=draws.integers(*sentences)).tolist() for _ in range(num_documents)]


def make_batches(corpus: Corpus, vocabulary: Vocabulary, **changes) -> PretrainingBatches:
    """Batches over a whole corpus, with settings that a test may change."""
    settings = {
        "documents": np.arange(corpus.num_documents),
        "sequence_length": 64,
        "short_share": 0.1,
        "masking": MaskingConfig(),
        "seed": 1234,
        "share": BatchShare(global_batch=16, microbatch=4),
    }
    settings.update(changes)
    return PretrainingBatches(corpus, vocabulary, settings.pop("documents"), **settings)


def restored(batch: Batch) -> np.ndarray:
    """``[batch, sequence]`` ids with the masked tokens put back."""
    ids = batch.input_ids.clone().flatten()
    is_label = batch.masked_labels != -100
    ids[batch.masked_positions[is_label]] = batch.masked_labels[is_label]
    return ids.view_as(batch.input_ids).numpy()


def is_masked(batch: Batch) -> np.ndarray:
    """``[batch, sequence]`` True at the tokens to restore."""
    flags = np.zeros(batch.input_ids.numel(), dtype=bool)
    flags[batch.masked_positions[batch.masked_labels != -100].numpy()] = True
    return flags.reshape(batch.input_ids.shape)


def halves(row: np.ndarray, *, cls: int = 2, sep: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """A and B of ``[CLS] A [SEP] B [SEP] [PAD]...``, whose form is checked."""
    first, last = np.flatnonzero(row == sep)
    assert row[0] == cls
    assert (row[last + 1 :] == 0).all()
    return row[1:first], row[first + 1 : last]
