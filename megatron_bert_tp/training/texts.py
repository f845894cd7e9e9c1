"""The text side of a run: corpus, tokenizer, split, and the batches of training and evaluation."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.data.batches import Batch, PretrainingBatches
from megatron_bert_tp.data.corpus import Corpus, check_token_ids, check_tokenizer
from megatron_bert_tp.data.draws import Ints
from megatron_bert_tp.data.sampler import BatchShare
from megatron_bert_tp.data.splits import split_documents
from megatron_bert_tp.data.tokenizer import Tokenizer
from megatron_bert_tp.data.unigram import unigram_counts, unigram_cross_entropy
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.parallel.cross_entropy import IGNORED
from megatron_bert_tp.parallel.mesh import Axis


@dataclass(frozen=True)
class Texts:
    """What a run reads: ``validation`` is None when nothing is evaluated."""

    corpus: Corpus
    training_documents: Ints
    training: PretrainingBatches
    validation: PretrainingBatches | None
    vocab_size: int

    def unigram_loss(self, batches: list[Batch]) -> float:
        """Cross entropy, in nats, of the masked targets of ``batches`` under the training part's frequencies."""
        labels = np.concatenate([batch.masked_labels.cpu().numpy() for batch in batches])
        counts = unigram_counts(self.corpus, self.training_documents, self.vocab_size)
        return unigram_cross_entropy(counts, labels[labels != IGNORED])


def open_texts(config: Config, data: Axis) -> Texts:
    """Open and check everything that ``config.data`` names, for this replica of the ``data`` axis."""
    tokenizer = Tokenizer.load(Path(config.data.tokenizer), config.data.lowercase)
    if tokenizer.size > config.model.vocab_size:
        raise DataError(
            f"{config.data.tokenizer} has {tokenizer.size} entries, but model.vocab_size is "
            f"{config.model.vocab_size}; set model.vocab_size={tokenizer.size} or take the model's own tokenizer"
        )
    if tokenizer.vocabulary.pad_id != config.model.pad_token_id:
        raise DataError(
            f"[PAD] has the id {tokenizer.vocabulary.pad_id} in {config.data.tokenizer}, but model.pad_token_id "
            f"is {config.model.pad_token_id}; set model.pad_token_id={tokenizer.vocabulary.pad_id}"
        )
    corpus = Corpus.open(Path(config.data.corpus))
    check_tokenizer(corpus, sha256=tokenizer.sha256, lowercase=tokenizer.lowercase)
    check_token_ids(corpus, tokenizer.size)
    training, validation, _test = split_documents(corpus.num_documents, config.data.split)
    evaluates = config.run.evaluation_samples > 0
    return Texts(
        corpus,
        training,
        _batches(config, corpus, tokenizer, training, data),
        _batches(config, corpus, tokenizer, validation, data) if evaluates else None,
        config.model.vocab_size,
    )


def _batches(
    config: Config, corpus: Corpus, tokenizer: Tokenizer, documents: Ints, data: Axis
) -> PretrainingBatches:
    share = BatchShare(
        global_batch=config.optimizer.global_batch,
        microbatch=config.parallel.microbatch,
        data_rank=data.rank,
        data_size=data.size,
    )
    return PretrainingBatches(
        corpus,
        tokenizer.vocabulary,
        documents,
        sequence_length=config.data.sequence_length,
        short_share=config.objective.short_sequences,
        masking=config.objective.masking,
        seed=config.optimizer.seed,
        share=share,
    )
