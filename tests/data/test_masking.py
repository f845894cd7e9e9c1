import numpy as np
import pytest

from megatron_bert_tp.config.schema import MaskingConfig
from tests.data.corpora import (
    FIRST,
    halves,
    is_masked,
    make_batches,
    numbered_documents,
    numbered_vocabulary,
    random_shape,
    restored,
)

NUM_SAMPLES = 20_000


@pytest.fixture
def corpus(write_corpus):
    return write_corpus(numbered_documents(random_shape(60, sentences=(20, 40))))


@pytest.fixture(scope="module")
def vocabulary():
    return numbered_vocabulary()


def draw_batch(corpus, vocabulary, **changes):
    return make_batches(corpus, vocabulary, short_share=0.0, **changes).batch(np.arange(NUM_SAMPLES))


def test_fifteen_of_a_hundred_text_tokens_are_masked(corpus, vocabulary):
    """Rounding at random deviates by at most 1/2 a sample: 5 sigma of 20,000 such."""
    batch = draw_batch(corpus, vocabulary)
    num_text = batch.num_tokens - 3 * NUM_SAMPLES
    assert abs(is_masked(batch).sum() - 0.15 * num_text) < 5 * 0.5 * np.sqrt(NUM_SAMPLES)


def test_masked_tokens_are_shown_eighty_ten_ten(corpus, vocabulary):
    """5 sigma of a binomial; one random token in 60,000 happens to be the right one."""
    batch = draw_batch(corpus, vocabulary)
    masked = is_masked(batch)
    shown, label = batch.input_ids.numpy()[masked], restored(batch)[masked]
    is_mask = shown == vocabulary.mask_id
    counts = np.array([is_mask.sum(), (~is_mask & (shown != label)).sum(), (shown == label).sum()])
    for count, share in zip(counts, (0.8, 0.1, 0.1), strict=True):
        assert abs(count - share * len(label)) < 5 * np.sqrt(share * (1 - share) * len(label))
    random = shown[~is_mask & (shown != label)]
    assert random.min() >= FIRST
    # Even over 59,995 ordinary ids: the mean has standard deviation 17,319 / sqrt(n).
    assert abs(random.mean() - (FIRST + 59_999) / 2) < 5 * 17_319 / np.sqrt(len(random))


def test_tokens_that_are_not_masked_are_shown_as_they_are(corpus, vocabulary):
    """Each A and B runs on by 1 in this corpus, so that a wrong token anywhere would show."""
    batch = make_batches(corpus, vocabulary).batch(np.arange(2000))
    for row in restored(batch):
        for half in halves(row):
            assert set(np.diff(half)) <= {1}


def test_special_tokens_are_never_masked(corpus, vocabulary):
    batch = draw_batch(corpus, vocabulary)
    assert restored(batch)[is_masked(batch)].min() >= FIRST


def test_words_are_masked_whole(corpus, vocabulary):
    batch = draw_batch(corpus, vocabulary)
    masked, ids = is_masked(batch), restored(batch)
    goes_on = ~vocabulary.starts_word[ids[:, 1:]] & (ids[:, :-1] >= FIRST)
    assert goes_on.sum() > 10_000
    assert (masked[:, 1:] == masked[:, :-1])[goes_on].all()
    # And not only whole words: neighbours that are two words are mostly told apart.
    assert (masked[:, 1:] != masked[:, :-1])[~goes_on].any()


def test_a_piece_that_begins_a_or_b_is_a_word_of_its_own(corpus, vocabulary):
    """Such pieces lost their word to truncation, or begin a sentence; 15 of 100 are masked, 5 sigma."""
    batch = draw_batch(corpus, vocabulary)
    masked, ids, columns = is_masked(batch), restored(batch), np.arange(NUM_SAMPLES)
    first_b = np.argmax(batch.token_type_ids.numpy(), axis=1)
    for first, before in ((np.ones_like(first_b), 1), (first_b, first_b - 2)):
        is_piece = ~vocabulary.starts_word[ids[columns, first]] & vocabulary.starts_word[ids[columns, first + 1]]
        here = masked[columns, first][is_piece]
        assert abs(here.mean() - 0.15) < 5 * np.sqrt(0.1275 / len(here))
        if first is first_b:
            assert (here != masked[columns, before][is_piece]).any()


def test_with_whole_words_off_pieces_are_masked_alone(corpus, vocabulary):
    batch = draw_batch(corpus, vocabulary, masking=MaskingConfig(whole_words=False))
    masked, ids = is_masked(batch), restored(batch)
    goes_on = ~vocabulary.starts_word[ids[:, 1:]] & (ids[:, :-1] >= FIRST)
    assert (masked[:, 1:] != masked[:, :-1])[goes_on].any()


def test_every_place_is_masked_alike(corpus, vocabulary):
    """Single tokens: each place of text is masked in 15 of 100 samples, 5 sigma of a binomial."""
    batch = draw_batch(corpus, vocabulary, masking=MaskingConfig(whole_words=False))
    masked, is_text = is_masked(batch), restored(batch) >= FIRST
    for column in range(1, 60):
        count = is_text[:, column].sum()
        assert abs(masked[is_text[:, column], column].sum() - 0.15 * count) < 5 * np.sqrt(0.1275 * count)


def test_shares_of_masking_are_settings(corpus, vocabulary):
    never = MaskingConfig(probability=0.5, mask_share=0.0, random_share=0.0)
    batch = draw_batch(corpus, vocabulary, masking=never)
    assert (batch.input_ids.numpy() == restored(batch)).all()
    assert abs(is_masked(batch).sum() / (batch.num_tokens - 3 * NUM_SAMPLES) - 0.5) < 0.005


def test_shortest_samples_have_one_masked_token(write_corpus):
    corpus = write_corpus(numbered_documents([[1, 1]] * 20))
    batch = make_batches(corpus, numbered_vocabulary(), masking=MaskingConfig(whole_words=False))
    assert is_masked(batch.batch(np.arange(200))).sum(axis=1).tolist() == [1] * 200
