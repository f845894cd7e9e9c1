"""Random documents, and batches over a whole corpus."""

import numpy as np

from megatron_bert_tp.config.schema import MaskingConfig
from megatron_bert_tp.data.batches import PretrainingBatches
from megatron_bert_tp.data.corpus import Corpus
from megatron_bert_tp.data.sampler import BatchShare
from megatron_bert_tp.data.tokenizer import Tokenizer


def random_documents(num_documents: int, seed: int = 0) -> list[list[list[int]]]:
    """Documents of 1 to 30 sentences of 1 to 40 tokens, a quarter of them pieces."""
    draws = np.random.default_rng(seed)
    return [
        [draws.integers(5, 200, size=draws.integers(1, 41)).tolist() for _ in range(draws.integers(1, 31))]
        for _ in range(num_documents)
    ]


def make_batches(corpus: Corpus, tokenizer: Tokenizer, **changes) -> PretrainingBatches:
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
    return PretrainingBatches(corpus, tokenizer.vocabulary, settings.pop("documents"), **settings)
