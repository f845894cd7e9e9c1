import dataclasses

import numpy as np
import pytest
import torch

from megatron_bert_tp.data.corpus.mapped import Corpus, check_token_ids
from megatron_bert_tp.data.packing import Cutting
from megatron_bert_tp.data.preprocessing.preprocess import preprocess
from megatron_bert_tp.data.samples.splits import split_documents
from megatron_bert_tp.data.tokenizer import Tokenizer
from tests.data.corpora import (
    halves,
    is_masked,
    make_batches,
    numbered_documents,
    numbered_vocabulary,
    random_shape,
    restored,
    samples_of,
)


@pytest.fixture
def corpus(write_corpus):
    return write_corpus(numbered_documents(random_shape(60)))


@pytest.fixture(scope="module")
def vocabulary():
    return numbered_vocabulary()


def test_fields_of_a_batch_fit_together(corpus, vocabulary):
    batch = make_batches(corpus, vocabulary, short_share=1.0).batch(np.array([3, 1, 4, 1000]))
    rows, width = batch.input_ids.shape
    lengths = (restored(batch) != 0).sum(axis=1)
    assert batch.sample_numbers == (3, 1, 4, 1000)
    assert (rows, width) == (4, -(-lengths.max() // 8) * 8)
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == (np.arange(width) < lengths[:, None]).tolist()
    assert batch.num_tokens == lengths.sum()
    for row, types in zip(restored(batch), batch.token_type_ids.tolist(), strict=True):
        a, b = halves(row)
        assert types == [0] * (len(a) + 2) + [1] * (len(b) + 1) + [0] * (width - len(a) - len(b) - 3)
    assert len(batch.masked_positions) == len(batch.masked_labels) == 64
    padding = batch.masked_labels == -100
    assert (batch.masked_positions[padding] == 0).all()
    assert padding.int().diff().min() >= 0
    integers = [
        getattr(batch, name) for name in ("input_ids", "token_type_ids", "masked_positions", "masked_labels")
    ]
    assert {tensor.dtype for tensor in [*integers, batch.next_sentence_labels]} == {torch.int64}


def test_only_a_batch_without_padding_has_no_attention_mask(corpus, vocabulary):
    batches = make_batches(corpus, vocabulary, short_share=0.5, sequence_length=16)
    made = [batches.batch(np.arange(n, n + 2)) for n in range(200)]
    is_full = [bool((restored(batch) != 0).all()) for batch in made]
    assert 0 < sum(is_full) < 200
    assert [batch.attention_mask is None for batch in made] == is_full


def test_sequence_length_that_is_no_multiple_of_8_is_the_largest_width(corpus, vocabulary):
    batch = make_batches(corpus, vocabulary, short_share=0.0, sequence_length=61).batch(np.arange(8))
    assert batch.input_ids.shape[1] == 61


def test_masked_list_grows_in_steps_of_64(corpus, vocabulary):
    batches = make_batches(corpus, vocabulary)
    for size in (1, 16, 50):
        batch = batches.batch(np.arange(size))
        count = int(is_masked(batch).sum())
        assert len(batch.masked_labels) == -(-count // 64) * 64


def test_a_sample_is_a_pure_function_of_seed_and_number(corpus, vocabulary):
    batches = make_batches(corpus, vocabulary)
    epochs = 3 * batches.num_samples_per_epoch
    together = samples_of(batches.batch(np.arange(epochs)))
    for number in np.random.default_rng(0).permutation(epochs)[:200].tolist():
        fresh = make_batches(corpus, vocabulary)
        assert samples_of(fresh.sample(number))[number] == together[number]
    assert samples_of(make_batches(corpus, vocabulary, seed=1).sample(5))[5] != together[5]


def test_an_epoch_has_every_span_once_and_masks_of_its_own(corpus, vocabulary):
    batches = make_batches(corpus, vocabulary)
    count = batches.num_samples_per_epoch
    spans = batches._samples._orders[0].spans(np.arange(2 * count)).reshape(2, count)
    assert np.sort(spans, axis=1).tolist() == [list(range(count))] * 2
    samples = samples_of(batches.batch(np.arange(2 * count)))
    number_of = [{int(span): epoch * count + n for n, span in enumerate(spans[epoch])} for epoch in (0, 1)]
    same = sum(samples[number_of[0][span]] == samples[number_of[1][span]] for span in range(count))
    assert same < 0.05 * count


CUTTINGS = {"none": 4, "bins": 256, "packed": 256}


@pytest.mark.parametrize("packing", CUTTINGS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_data_ranks_share_the_same_samples_for_any_size_and_packing(corpus, vocabulary, size, packing):
    alone = {}
    for batch in make_batches(corpus, vocabulary).take(48):
        alone.update(samples_of(batch))
    assert sorted(alone) == list(range(48, 64))
    dealt = {}
    for rank in range(size):
        cutting = Cutting(packing=packing, size=CUTTINGS[packing], data_rank=rank, data_size=size)
        for batch in make_batches(corpus, vocabulary, cutting=cutting).take(48):
            dealt.update(samples_of(batch))
    assert dealt == alone


def test_packed_rows_hold_their_samples_one_behind_another(corpus, vocabulary):
    cutting = Cutting(packing="packed", size=250)
    made = make_batches(corpus, vocabulary, short_share=0.5, cutting=cutting).take(16)
    assert len(made) > 2
    for batch in made:
        assert batch.packed_lengths is not None
        assert batch.attention_mask is None
        num_tokens = sum(batch.packed_lengths)
        assert batch.num_tokens == num_tokens <= 248
        assert batch.input_ids.shape == (1, -(-num_tokens // 8) * 8)
        assert (batch.input_ids[0, num_tokens:] == 0).all()
        restarting = [place for length in batch.packed_lengths for place in range(length)]
        assert batch.position_ids[0, :num_tokens].tolist() == restarting
        assert (batch.input_ids[0, [n for n, place in enumerate(restarting) if place == 0]] == 2).all()
        assert len(batch.next_sentence_labels) == len(batch.sample_numbers) == len(batch.packed_lengths)
        assert len(batch.masked_labels) % 64 == 0
        assert {batch.position_ids.dtype, batch.input_ids.dtype, batch.token_type_ids.dtype} == {torch.int64}


def test_a_replica_without_samples_gets_padding_with_nothing_to_predict(corpus, vocabulary):
    cutting = Cutting(packing="none", size=16, data_rank=1, data_size=2)
    (batch,) = make_batches(corpus, vocabulary, cutting=cutting).take(0)
    assert batch.input_ids.tolist() == [[0] * 8]
    assert set(batch.masked_labels.tolist()) == set(batch.next_sentence_labels.tolist()) == {-100}
    assert batch.num_tokens == 0


def test_microbatches_of_a_step_equal_those_built_alone(corpus, vocabulary):
    batches = make_batches(corpus, vocabulary, short_share=1.0, sequence_length=128)
    microbatches = batches.take(112)
    assert len({batch.input_ids.shape for batch in microbatches}) > 1
    for batch in microbatches:
        alone = batches.batch(np.array(batch.sample_numbers))
        for field in dataclasses.fields(batch):
            expected, found = getattr(alone, field.name), getattr(batch, field.name)
            assert torch.equal(expected, found) if isinstance(expected, torch.Tensor) else expected == found


def test_evaluation_is_static_and_at_most_an_epoch(corpus, vocabulary):
    batches = make_batches(corpus, vocabulary)
    count = batches.num_samples_per_epoch
    first, again = batches.evaluation(10), make_batches(corpus, vocabulary).evaluation(10)
    assert [batch.sample_numbers for batch in first] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert [samples_of(batch) for batch in first] == [samples_of(batch) for batch in again]
    assert sum(len(batch.sample_numbers) for batch in batches.evaluation(10 * count)) == count


def test_moved_batch_keeps_every_field(corpus, vocabulary):
    batch = make_batches(corpus, vocabulary).batch(np.arange(2))
    moved = batch.to(torch.device("meta"))
    assert moved.input_ids.device.type == "meta"
    assert (moved.sample_numbers, moved.num_tokens) == (batch.sample_numbers, batch.num_tokens)
    assert samples_of(batch.to(torch.device("cpu"))) == samples_of(batch)


def test_novels_become_readable_samples(shared_file, tmp_path):
    novels = [shared_file(f"novels/{name}.txt") for name in ("Doyle_Hound_1902", "Kipling_Kim_1901")]
    vocabulary_file = shared_file("vocab/bert-large-uncased-vocab.txt")
    preprocess(novels, vocabulary_file, tmp_path / "novels")
    corpus, tokenizer = Corpus.open(tmp_path / "novels"), Tokenizer.load(vocabulary_file, lowercase=True)
    check_token_ids(corpus, tokenizer.size)
    training, validation, _ = split_documents(corpus.num_documents, (96.0, 4.0, 0.0))
    batches = make_batches(corpus, tokenizer.vocabulary, documents=training, sequence_length=128)
    text = " ".join(tokenizer.decode(corpus.sentence(n)) for n in range(corpus.num_sentences))
    for row in restored(batches.batch(np.arange(50))):
        for half in halves(row, cls=101, sep=102):
            assert tokenizer.decode(half).removeprefix("##") in text
    held_out = make_batches(corpus, tokenizer.vocabulary, documents=validation, sequence_length=128)
    assert 0 < held_out.num_samples_per_epoch < batches.num_samples_per_epoch / 10
