"""The text side of a run: corpora, tokenizer, split, and the batches of training and evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.data.batches import PretrainingBatches
from megatron_bert_tp.data.corpus.mapped import Corpus, check_token_ids, check_tokenizer
from megatron_bert_tp.data.corpus.unigram import unigram_counts, unigram_cross_entropy
from megatron_bert_tp.data.packing import Cutting
from megatron_bert_tp.data.samples.source import SampleSource, SourceSettings
from megatron_bert_tp.data.samples.spans import TooFewDocumentsError
from megatron_bert_tp.data.samples.splits import PartName
from megatron_bert_tp.data.tokenizer import Tokenizer
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.parallel.cross_entropy import IGNORED
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.training.numbers import batch_size

_WITHOUT: dict[PartName, str] = {"validation": "; or evaluate nothing, with run.evaluation_samples=0"}


@dataclass(frozen=True)
class Texts:
    """What a run reads: ``validation`` is None when nothing is evaluated."""

    source: SampleSource
    """Samples of the training part."""
    training: PretrainingBatches
    validation: PretrainingBatches | None
    vocab_size: int

    @property
    def fingerprints(self) -> list[str]:
        """What tells each corpus from others: digest of its boundaries, and of its tokens where it is known."""
        return [
            corpus.digest if corpus.facts is None else f"{corpus.digest} {corpus.facts.bin_sha256}"
            for corpus in self.source.corpora
        ]

    def unigram_loss(self, batches: list[Batch], *, advance: Callable[[], None] = lambda: None) -> float:
        """Cross entropy, in nats, of the masked targets of ``batches`` under the training part's frequencies.

        It reads the whole part; ``advance`` is called now and then.
        """
        labels = np.concatenate([batch.masked_labels.cpu().numpy() for batch in batches])
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for number, corpus in enumerate(self.source.corpora):
            counts += unigram_counts(
                corpus, self.source.documents(number), self.vocab_size, advance=advance
            )
        return unigram_cross_entropy(counts, labels[labels != IGNORED])


def open_texts(config: Config, data: Axis, *, say: Callable[[str], None]) -> Texts:
    """Open and check everything that ``config.data`` names, for this replica of the ``data`` axis.

    ``say`` is told what takes its time: a sample index that is built, or for which another process is awaited.
    """
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
    corpora = [_open_corpus(Path(prefix), tokenizer) for prefix in config.data.corpus]
    settings = _source_settings(config)

    def source(part: PartName) -> SampleSource:
        try:
            return SampleSource.open(corpora, part=part, settings=settings, say=say)
        except TooFewDocumentsError as error:
            raise DataError(f"the {part} part of data.split: {error}{_WITHOUT.get(part, '')}") from error

    training = source("training")
    return Texts(
        training,
        _batches(config, training, tokenizer, data),
        _batches(config, source("validation"), tokenizer, data) if config.run.evaluation_samples > 0 else None,
        config.model.vocab_size,
    )


def _open_corpus(prefix: Path, tokenizer: Tokenizer) -> Corpus:
    corpus = Corpus.open(prefix)
    check_tokenizer(corpus, sha256=tokenizer.sha256, lowercase=tokenizer.lowercase)
    check_token_ids(corpus, tokenizer.size)
    return corpus


def _source_settings(config: Config) -> SourceSettings:
    return SourceSettings(
        split=config.data.split,
        sequence_length=config.data.sequence_length,
        short_share=config.objective.short_sequences,
        pairs=config.objective.pairs,
        seed=config.optimizer.seed,
        weights=config.data.weights,
        index_cache=Path(config.run.index_cache) if config.run.index_cache else None,
        wait_seconds=config.run.timeout_seconds,
    )


def _batches(config: Config, source: SampleSource, tokenizer: Tokenizer, data: Axis) -> PretrainingBatches:
    parallel = config.parallel
    size = parallel.microbatch if parallel.packing == "none" else parallel.microbatch_tokens
    assert size is not None, "the rules of the settings ask for the one that packing needs"
    return PretrainingBatches(
        source,
        tokenizer.vocabulary,
        sequence_length=config.data.sequence_length,
        masking=config.objective.masking,
        seed=config.optimizer.seed,
        size_of=batch_size(config.optimizer).global_batch_at,
        cutting=Cutting(packing=parallel.packing, size=size, data_rank=data.rank, data_size=data.size),
    )
