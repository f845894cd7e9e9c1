"""Shares over 100,000 samples of length 128, of made-up text and of real text.

The numbers of samples and the seed are fixed, and so are the results: a bound either holds for good or not at
all.  Each bound is what the recipe asks for or, where five standard deviations are less, those.
"""

import re
from dataclasses import dataclass

import numpy as np
import pytest

from megatron_bert_tp.config.schema import MaskingConfig
from megatron_bert_tp.data.corpus.mapped import Corpus
from megatron_bert_tp.data.corpus.writer import CorpusWriter
from megatron_bert_tp.data.samples.masking import mask_rows
from megatron_bert_tp.data.samples.pairs import choose_pairs, lay_out
from megatron_bert_tp.data.samples.sampler import SampleOrder
from megatron_bert_tp.data.samples.span_masking import draw_span_lengths
from megatron_bert_tp.data.samples.spans import build_spans
from megatron_bert_tp.data.tokenizer import Tokenizer, Vocabulary

NUM_SAMPLES, AT_ONCE = 100_000, 5_000
SEQUENCE_LENGTH, SEED = 128, 1234
MASKINGS = {
    "words": MaskingConfig(),
    "inverse 3": MaskingConfig(longest_span=3),
    "geometric 10": MaskingConfig(longest_span=10, span_lengths="geometric"),
}


@dataclass(frozen=True)
class Text:
    corpus: Corpus
    vocabulary: Vocabulary

    def spans(self, task="nsp"):
        documents = np.arange(self.corpus.num_documents)
        settings = {"sequence_length": SEQUENCE_LENGTH, "short_share": 0.1, "seed": SEED, "pairs": task}
        return build_spans(self.corpus, documents, **settings)

    def pairs(self, task="nsp"):
        """The pairs of all samples, some thousand at a time."""
        spans = self.spans(task)
        order = SampleOrder(len(spans), SEED)
        for numbers in np.array_split(np.arange(NUM_SAMPLES), NUM_SAMPLES // AT_ONCE):
            chosen = order.spans(numbers)
            yield numbers, choose_pairs(self.corpus, spans, chosen, seed=SEED, numbers=numbers, task=task)

    def masked(self, masking):
        """Rows of all samples, and what is masked in them."""
        for numbers, pairs in self.pairs():
            rows = lay_out(self.corpus.tokens, pairs, self.vocabulary, width=SEQUENCE_LENGTH)
            yield rows, mask_rows(rows, self.vocabulary, masking, seed=SEED, numbers=numbers)

    def documents_of(self, tokens):
        """Number of the document that holds each token, from the places where documents begin."""
        starts = self.corpus.starts_of(np.asarray(self.corpus.documents))
        return np.searchsorted(starts, tokens, side="right") - 1


def write(path, tokenizer, documents):
    with CorpusWriter(path, tokenizer) as writer:
        for sentences in documents:
            writer.add_document(np.concatenate(sentences), [len(sentence) for sentence in sentences])
    return Text(Corpus.open(path), tokenizer.vocabulary)


def made_up_documents():
    """1,000 documents of 2 to 60 sentences of 1 to 90 tokens, with ids of which rare ones are pieces of words."""
    draws = np.random.default_rng(0)
    for num_sentences in draws.integers(2, 60, 1000):
        lengths = np.clip(draws.lognormal(2.8, 0.7, num_sentences).astype(int), 1, 90)
        yield [5 + (draws.zipf(1.1, length) % 195) for length in lengths]


def articles(paths, tokenizer):
    """WikiText: " = Title = " begins an article; sentences are split at full stops, which is good enough here."""
    for path in paths:
        for article in re.split(r"\n = [^=]+ = \n", path.read_text(encoding="utf-8")):
            lines = [line for line in article.splitlines() if line.strip() and not line.startswith(" =")]
            sentences = [s for line in lines for s in re.split(r"(?<= \.) ", line) if s.strip()]
            if sentences:
                yield tokenizer.encode_batch(sentences)


@pytest.fixture(scope="module", params=["made-up", "wikitext-2"])
def text(request, tokenizer, tmp_path_factory, shared_file):
    path = tmp_path_factory.mktemp(request.param) / "corpus"
    if request.param == "made-up":
        return write(path, tokenizer, made_up_documents())
    english = Tokenizer.load(shared_file("vocab/bert-large-uncased-vocab.txt"), lowercase=True)
    files = [shared_file(f"wikitext-2/{name}.txt") for name in ("valid", "test")]
    return write(path, english, articles(files, english))


def share_of(parts):
    """Sum of the first numbers over the sum of the second ones."""
    counts, totals = np.sum(list(parts), axis=0).tolist()
    return counts / totals


@dataclass
class Counts:
    """What is counted in one pass over all samples."""

    text: int = 0
    masked: int = 0
    special: int = 0
    """Masked tokens that are no text."""
    changed: int = 0
    """Tokens that are not masked and yet are shown as others."""
    pieces: int = 0
    """Tokens that go on with a word."""
    torn: int = 0
    """Of these, masked where the token before is not, or the other way round."""
    as_mask: int = 0
    as_another: int = 0
    as_special: int = 0
    """Masked tokens that are shown as a special token other than [MASK]."""

    def add(self, vocabulary, rows, masked):
        is_masked, special = masked.is_masked, [vocabulary.pad_id, vocabulary.cls_id, vocabulary.sep_id]
        goes_on = ~vocabulary.starts_word[rows.ids[:, 1:]] & rows.is_text[:, :-1] & rows.is_text[:, 1:]
        shown, right = masked.ids[is_masked], rows.ids[is_masked]
        is_mask = shown == vocabulary.mask_id
        self.text += rows.is_text.sum()
        self.masked += is_masked.sum()
        self.special += np.isin(right, special).sum()
        self.changed += (masked.ids != rows.ids)[~is_masked].sum()
        self.pieces += goes_on.sum()
        self.torn += (is_masked[:, 1:] != is_masked[:, :-1])[goes_on].sum()
        self.as_mask += is_mask.sum()
        self.as_another += (~is_mask & (shown != right)).sum()
        self.as_special += np.isin(shown, special).sum()


@pytest.fixture(scope="module", params=MASKINGS)
def counts(text, request):
    counts = Counts()
    for rows, masked in text.masked(MASKINGS[request.param]):
        counts.add(text.vocabulary, rows, masked)
    return counts


def test_fifteen_of_a_hundred_tokens_are_masked(counts):
    """Asked for within 0.1 points.

    Rounding at random has a standard deviation of at most 1/2 a sample: 158 of some 10 million tokens in all,
    0.002 points.  Samples of less than 7 tokens have at least one masked, which adds about 0.002 points, and
    where no word left is short enough some tokens are missing, which takes about as little away.
    """
    assert abs(counts.masked / counts.text - 0.15) < 0.0002


def test_words_are_masked_whole(counts):
    assert counts.pieces > 5 * NUM_SAMPLES
    assert counts.torn == 0


def test_special_tokens_are_neither_masked_nor_shown(counts):
    assert (counts.special, counts.as_special, counts.changed) == (0, 0, 0)


def test_masked_tokens_are_shown_eighty_ten_ten(text, counts):
    """Asked for within 0.3 points; five standard deviations of some 1.6 million tokens are 0.16.

    A random token is the right one in 1 of 195 cases of the made-up text: 0.05 points seem kept, not random.
    """
    by_chance = 0.1 / len(text.vocabulary.ordinary_ids)
    assert abs(counts.as_mask / counts.masked - 0.8) < 0.0016
    assert abs(counts.as_another / counts.masked - (0.1 - by_chance)) < 0.0016


@pytest.mark.parametrize(
    ("name", "shares"),
    [("inverse 3", [6 / 11, 3 / 11, 2 / 11]), ("geometric 10", [0.2 * 0.8**n / (1 - 0.8**10) for n in range(10)])],
)
def test_drawn_span_lengths_have_their_shares(name, shares):
    """Asked for within 0.5 points; five standard deviations of a million draws are 0.25."""
    words = np.tile(np.arange(10), (NUM_SAMPLES, 1))
    lengths = draw_span_lengths(MASKINGS[name], seed=SEED, numbers=np.arange(NUM_SAMPLES), words=words)
    found = np.bincount(lengths.ravel(), minlength=len(shares) + 1) / lengths.size
    assert found[0] == 0
    assert np.abs(found[1:] - shares).max() < 0.0025


@pytest.mark.parametrize("task", ["nsp", "sop"])
def test_half_of_the_labels_are_one(text, task):
    """Asked for within 0.3 points, which are 1.9 standard deviations (0.158) of 100,000 draws."""
    parts = ((pairs.labels.sum(), len(pairs.labels)) for _, pairs in text.pairs(task))
    assert abs(share_of(parts) - 0.5) < 0.003


def test_no_random_pair_is_from_the_same_document(text):
    for _, pairs in text.pairs("nsp"):
        a, b = (
            [text.documents_of(first), text.documents_of(first + length - 1)]
            for first, length in ((pairs.first_a, pairs.length_a), (pairs.first_b, pairs.length_b))
        )
        assert (a[0] == a[1]).all()
        assert (b[0] == b[1]).all()
        assert ((a[0] != b[0]) == (pairs.labels == 1)).all()


def test_swapped_parts_are_from_one_document_and_in_the_wrong_order(text):
    for _, pairs in text.pairs("sop"):
        assert (text.documents_of(pairs.first_a) == text.documents_of(pairs.first_b)).all()
        assert ((pairs.first_a > pairs.first_b) == (pairs.labels == 1)).all()


@pytest.mark.parametrize(("task", "longest"), [("nsp", 125), ("sop", 125), ("none", 126)])
def test_a_tenth_of_the_targets_is_short(text, task, longest):
    """Five standard deviations of the number of spans; one in longest - 1 short targets is not shorter."""
    target = text.spans(task).target
    share = 0.1 * (longest - 2) / (longest - 1)
    assert abs((target < longest).mean() - share) < 5 * np.sqrt(share * (1 - share) / len(target))
    assert target.min() == 2
    assert target.max() == longest
    longest_samples = [int(pairs.lengths.max()) for _, pairs in text.pairs(task)]
    assert max(longest_samples) == SEQUENCE_LENGTH
