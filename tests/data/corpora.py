"""Corpora whose every token tells where it stands, and batches over a whole corpus."""

from dataclasses import dataclass

import numpy as np

from megatron_bert_tp.config.schema import MaskingConfig
from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.data.batches import PretrainingBatches
from megatron_bert_tp.data.corpus.mapped import Corpus
from megatron_bert_tp.data.packing import Cutting
from megatron_bert_tp.data.samples.source import SampleSource, SourceSettings
from megatron_bert_tp.data.samples.spans import build_spans
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


def starts_of(corpus: Corpus) -> np.ndarray:
    """``[sentences + 1]`` first token of each sentence, then the number of tokens, from the lengths alone."""
    return np.concatenate([[0], np.cumsum(np.array(corpus.lengths))])


def make_source(corpus: Corpus, documents: np.ndarray | None = None, **changes) -> SampleSource:
    """Samples of a whole corpus or of some documents, with settings that a test may change."""
    values = {"sequence_length": 64, "short_share": 0.1, "pairs": "nsp", "seed": 1234}
    values.update(changes)
    documents = np.arange(corpus.num_documents) if documents is None else documents
    spans = build_spans(corpus, documents, **values)
    return SampleSource([corpus], [spans], "training", SourceSettings(split=(1.0, 0.0, 0.0), **values))


@dataclass(frozen=True)
class Even:
    """Steps of one size; a class, because worker processes get it pickled."""

    size: int

    def __call__(self, _samples_done: int) -> int:
        return self.size


def make_batches(
    corpus: Corpus,
    vocabulary: Vocabulary,
    *,
    documents: np.ndarray | None = None,
    masking: MaskingConfig | None = None,
    cutting: Cutting | None = None,
    **changes,
) -> PretrainingBatches:
    """Batches of 16 samples, cut to 4 unless a test says otherwise, over `make_source`."""
    return PretrainingBatches(
        make_source(corpus, documents, **changes),
        vocabulary,
        sequence_length=changes.get("sequence_length", 64),
        masking=masking or MaskingConfig(),
        seed=changes.get("seed", 1234),
        size_of=Even(16),
        cutting=cutting or Cutting(packing="none", size=4),
    )


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


def samples_of(batch: Batch) -> dict[int, tuple[list[int], list[int], list[int], int]]:
    """Each sample by its number as (shown ids, types, masked columns, label), without padding, packed or not."""
    if batch.packed_lengths is None:
        rows = range(len(batch.input_ids)) if batch.num_tokens else []
        lengths = (restored(batch) != 0).sum(axis=1)
        places = [(row, slice(0, lengths[row])) for row in rows]
    else:
        ends = np.cumsum(batch.packed_lengths).tolist()
        places = [(0, slice(end - length, end)) for end, length in zip(ends, batch.packed_lengths, strict=True)]
    masked, labels = is_masked(batch), batch.next_sentence_labels.tolist()
    return {
        batch.sample_numbers[n]: (
            batch.input_ids[row, part].tolist(),
            batch.token_type_ids[row, part].tolist(),
            np.flatnonzero(masked[row, part]).tolist(),
            labels[n],
        )
        for n, (row, part) in enumerate(places)
    }
