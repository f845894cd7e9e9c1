"""The greedy choice of spans, against one that looks at word after word as docs/samples.md says."""

from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest

from megatron_bert_tp.config.schema import MaskingConfig
from megatron_bert_tp.data.draws import Purpose, draw, streams
from megatron_bert_tp.data.samples.masking import mask_rows
from megatron_bert_tp.data.samples.pairs import Rows
from megatron_bert_tp.data.samples.span_masking import choose_tokens, draw_span_lengths, span_length_shares
from tests.data.corpora import numbered_vocabulary

SEED = 99
CLS, SEP = 2, 3
GEOMETRIC = MaskingConfig(longest_span=10, span_lengths="geometric")
SETTINGS = {
    "words": MaskingConfig(),
    "tokens": MaskingConfig(whole_words=False),
    "inverse 2": MaskingConfig(longest_span=2),
    "inverse 3": MaskingConfig(longest_span=3),
    "inverse 3 of tokens": MaskingConfig(longest_span=3, whole_words=False),
    "geometric 10": GEOMETRIC,
    "geometric 10 of tokens": replace(GEOMETRIC, whole_words=False),
    "geometric 64": replace(GEOMETRIC, longest_span=64, span_stop=0.02),
    "few": MaskingConfig(longest_span=3, probability=0.02),
    "half": MaskingConfig(longest_span=3, probability=0.5),
    "nearly all": MaskingConfig(longest_span=10, probability=0.97),
    "at most 1": MaskingConfig(longest_span=3, maximum=1),
    "at most 5": MaskingConfig(longest_span=3, probability=0.3, maximum=5),
}


@pytest.fixture(scope="module")
def vocabulary():
    return numbered_vocabulary(2000)


def random_rows(num_rows, *, longest, seed=0, width=None):
    """Rows of one or two segments of random lengths and ids; a fourth of the ids goes on with a word."""
    draws = np.random.default_rng(seed)
    ids = np.zeros((num_rows, width or 2 * longest + 3), dtype=np.int64)
    is_text = np.zeros(ids.shape, dtype=bool)
    for row in range(num_rows):
        end = 1
        ids[row, 0] = CLS
        for _segment in range(draws.integers(1, 3)):
            length = int(draws.integers(1, longest + 1))
            ids[row, end : end + length] = draws.integers(5, 2000, length)
            is_text[row, end : end + length] = True
            ids[row, end + length] = SEP
            end += length + 1
    return Rows(ids, is_text, np.zeros_like(ids))


def bits_of(purpose, number, count):
    return [int(bits) for bits in draw(streams(SEED, purpose, np.array([number])), np.arange(count))]


def segments_of(is_text):
    """Lists of neighbouring columns of text."""
    columns = [int(column) for column in np.flatnonzero(is_text)]
    segments = []
    for column in columns:
        if not segments or segments[-1][-1] != column - 1:
            segments.append([])
        segments[-1].append(column)
    return segments


def words_of(segment, ids, vocabulary, masking):
    """Lists of columns: a piece belongs to the token before it, unless nothing of the segment is before it."""
    words = []
    for column in segment:
        is_piece = masking.whole_words and not vocabulary.starts_word[ids[column]]
        if words and is_piece:
            words[-1].append(column)
        else:
            words.append([column])
    return words


def one_by_one(ids, is_text, vocabulary, masking, number):
    """Columns to restore in one row."""
    segments = [words_of(segment, ids, vocabulary, masking) for segment in segments_of(is_text)]
    following = [segment[n:] for segment in segments for n in range(len(segment))]  # words from each word on
    budget_bits, *order_bits = bits_of(Purpose.WORD, number, len(following) + 1)
    length_bits = bits_of(Purpose.SPAN_LENGTH, number, len(following))
    num_tokens = sum(len(word) for segment in segments for word in segment)
    budget = int(masking.probability * num_tokens + (budget_bits >> 11) / 2**53)
    budget = min(max(budget, 1), masking.maximum or 10**9)
    shares = {"inverse": lambda n: 1 / n, "geometric": lambda n: (1 - masking.span_stop) ** (n - 1)}
    weights = [shares[masking.span_lengths](n) for n in range(1, masking.longest_span + 1)]
    limits = [limit / sum(weights) for limit in accumulate(weights)]
    taken = set()
    for word in sorted(range(len(following)), key=order_bits.__getitem__):
        share = (length_bits[word] >> 11) / 2**53
        length = next((n for n, limit in enumerate(limits, start=1) if share < limit), masking.longest_span)
        span = following[word][:length]
        while span and sum(map(len, span)) > budget - len(taken):
            span = span[:-1]
        columns = {column for word in span for column in word}
        if not columns & taken:
            taken |= columns
    return taken


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("longest", [6, 60])
def test_tokens_are_those_chosen_one_by_one(vocabulary, name, longest):
    masking, rows = SETTINGS[name], random_rows(120, longest=longest)
    numbers = np.arange(120) * 1000
    masked = mask_rows(rows, vocabulary, masking, seed=SEED, numbers=numbers)
    for number, ids, is_text, found in zip(numbers, rows.ids, rows.is_text, masked.is_masked, strict=True):
        assert set(np.flatnonzero(found)) == one_by_one(ids, is_text, vocabulary, masking, number)


def test_what_is_shown_follows_the_draws(vocabulary):
    masking = MaskingConfig(probability=0.5, mask_share=0.5, random_share=0.3)
    rows = random_rows(50, longest=20)
    masked = mask_rows(rows, vocabulary, masking, seed=SEED, numbers=np.arange(50))
    assert (masked.labels == rows.ids).all()
    assert (masked.ids == rows.ids)[~masked.is_masked].all()
    seen = set()
    for number in range(50):
        kinds, tokens = (
            bits_of(purpose, number, rows.ids.shape[1])
            for purpose in (Purpose.REPLACEMENT, Purpose.REPLACEMENT_TOKEN)
        )
        for column in np.flatnonzero(masked.is_masked[number]):
            share = (kinds[column] >> 11) / 2**53
            random = 5 + ((tokens[column] >> 32) * 1995 >> 32)
            choices = [vocabulary.mask_id, random, rows.ids[number, column]]
            kind = 0 if share < 0.5 else 1 if share < 0.8 else 2
            assert masked.ids[number, column] == choices[kind]
            seen.add(kind)
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("name", ["words", "inverse 3", "geometric 10", "nearly all"])
def test_a_row_depends_neither_on_the_others_nor_on_padding(vocabulary, name):
    masking, rows = SETTINGS[name], random_rows(200, longest=40)
    numbers = np.random.default_rng(1).integers(10**9, size=200)
    together = mask_rows(rows, vocabulary, masking, seed=SEED, numbers=numbers)
    for size, extra in ((1, 0), (1, 37), (13, 5), (200, 100)):
        for part in np.array_split(np.random.default_rng(2).permutation(200), 200 // size):
            padded = [np.pad(array[part], ((0, 0), (0, extra))) for array in (rows.ids, rows.is_text, rows.types)]
            alone = mask_rows(Rows(*padded), vocabulary, masking, seed=SEED, numbers=numbers[part])
            width = rows.ids.shape[1]
            assert alone.ids[:, :width].tobytes() == together.ids[part].tobytes()
            assert alone.is_masked[:, :width].tobytes() == together.is_masked[part].tobytes()
            assert not alone.is_masked[:, width:].any()


def test_no_separator_is_chosen_between_two_segments():
    """A segment of 2 tokens and one of 40, of which half is chosen: a span of 64 would go on behind the first."""
    is_text = np.tile([False, *[True] * 2, False, *[True] * 40, False], (500, 1))
    masking = replace(SETTINGS["geometric 64"], probability=0.5)
    chosen = choose_tokens(is_text, is_text, masking, seed=SEED, numbers=np.arange(500))
    assert chosen[:, 2].sum() > 10
    assert not chosen[~is_text].any()
    assert chosen.sum(axis=1).tolist() == [21] * 500


def test_a_sample_of_one_token_has_it_masked():
    is_text = np.array([[False, True, False, False]])
    assert (
        choose_tokens(is_text, is_text, GEOMETRIC, seed=SEED, numbers=np.array([5])).tolist() == is_text.tolist()
    )


def test_shares_of_span_lengths_are_the_published_ones():
    """6 : 3 : 2 elevenths, and a mean of 3.8 words (Joshi et al. 2019, section 3.1)."""
    assert (span_length_shares(MaskingConfig(longest_span=3)) * 11).tolist() == pytest.approx([6, 3, 2])
    shares = span_length_shares(GEOMETRIC)
    assert shares.sum() == pytest.approx(1)
    assert (shares[1:] / shares[:-1]).tolist() == pytest.approx([0.8] * 9)
    assert (shares * np.arange(1, 11)).sum() == pytest.approx(3.8, abs=0.01)


def test_span_lengths_are_drawn_with_their_shares():
    """5 sigma of a binomial of 100,000, for every length of up to 64 words."""
    for masking in (SETTINGS["inverse 3"], GEOMETRIC, SETTINGS["geometric 64"], MaskingConfig(longest_span=64)):
        words = np.tile(np.arange(100), (1000, 1))
        lengths = draw_span_lengths(masking, seed=SEED, numbers=np.arange(1000), words=words)
        counts = np.bincount(lengths.ravel(), minlength=masking.longest_span + 1)
        shares = span_length_shares(masking)
        assert counts[0] == 0
        assert len(counts) == masking.longest_span + 1
        assert (np.abs(counts[1:] - shares * 1e5) < 5 * np.sqrt(1e5 * shares * (1 - shares))).all()
