"""Sentences of words as samples: a sentence each, or as much of a document as fits; no word is ever left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Literal

import numpy as np

from megatron_bert_tp.data.draws import Ints
from megatron_bert_tp.parallel.cross_entropy import IGNORED
from megatron_bert_tp.tasks.examples import WordsExample
from megatron_bert_tp.tasks.feature_table import FeatureTable, Flags, Tokens, bounds_of
from megatron_bert_tp.tasks.labels import Labels
from megatron_bert_tp.tasks.task import Kind
from megatron_bert_tp.text.encoder import TextEncoder

_SENTENCES_AT_ONCE = 4096
_NUM_MARKS = 2  # [CLS] and [SEP]


def tag_features(
    examples: Sequence[WordsExample],
    encoder: TextEncoder,
    *,
    labels: Labels | None,
    longest: int,
    unit: Literal["sentence", "document"],
) -> FeatureTable:
    """Samples of at most ``longest`` tokens: sentences, or ``unit`` "document" as many of them as fit.

    What is too long is cut between sentences where that is possible, else between words, and only a word that is
    longer than a row loses tokens at its end.  A word without a token (of control characters alone) stands in no
    sample.
    """
    tokens = _tokens_of(examples, encoder)
    pieces = [
        piece
        for sentences in _groups(examples, unit)
        for piece in _pieces(tokens, sentences, room=longest - _NUM_MARKS)
    ]
    lengths = np.array([piece.end - piece.start for piece in pieces], dtype=np.int64)
    bounds = bounds_of(lengths + _NUM_MARKS)
    is_inner = np.ones(int(bounds[-1]), dtype=bool)
    is_inner[bounds[:-1]] = is_inner[bounds[1:] - 1] = False
    taken = np.concatenate([np.arange(0), *(np.arange(piece.start, piece.end) for piece in pieces)])
    ids = np.full(len(is_inner), encoder.sep_id, dtype=np.int32)
    ids[bounds[:-1]] = encoder.cls_id
    ids[is_inner] = tokens.ids[taken]
    words = np.full(len(is_inner), -1)
    words[is_inner] = np.where(tokens.is_first[taken], tokens.words[taken], -1)
    return FeatureTable(
        kind=Kind.TAGS,
        ids=ids,
        types=np.zeros(len(ids), dtype=np.uint8),
        bounds=bounds,
        examples=np.array([piece.sentence for piece in pieces], dtype=np.int64),
        labels=_labels_of(examples, words, labels),
        words=words,
        truncated=sum(piece.is_cut for piece in pieces),
    )


@dataclass(frozen=True)
class _Tokens:
    """Tokens of all sentences, one behind another, without [CLS] and [SEP].

    ``words`` are numbers among all words of all examples, ``bounds`` ``[sentences + 1]`` is where sentences begin.
    """

    ids: Tokens
    words: Ints
    is_first: Flags
    bounds: Ints


@dataclass(frozen=True)
class _Piece:
    """Tokens from ``start`` to before ``end``; the first is of ``sentence``.  ``is_cut``: a word lost its end."""

    start: int
    end: int
    sentence: int
    is_cut: bool = False


def _tokens_of(examples: Sequence[WordsExample], encoder: TextEncoder) -> _Tokens:
    ids, words, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)], []
    for first in range(0, len(examples), _SENTENCES_AT_ONCE):
        encodings = encoder.encoded_words([each.words for each in examples[first : first + _SENTENCES_AT_ONCE]])
        ids.append(np.fromiter(chain.from_iterable(each.ids for each in encodings), np.int32))
        words.append(np.fromiter(chain.from_iterable(each.word_ids for each in encodings), np.int64))
        lengths += [len(each) for each in encodings]
    first_words = bounds_of(np.array([len(each.words) for each in examples], dtype=np.int64))[:-1]
    numbers = np.concatenate(words) + np.repeat(first_words, lengths)
    return _Tokens(
        ids=np.concatenate(ids),
        words=numbers,
        is_first=np.diff(numbers, prepend=-1) > 0,
        bounds=bounds_of(np.array(lengths, dtype=np.int64)),
    )


def _groups(examples: Sequence[WordsExample], unit: Literal["sentence", "document"]) -> list[range]:
    """Numbers of the sentences that may share a sample."""
    if unit == "sentence":
        return [range(number, number + 1) for number in range(len(examples))]
    documents = groupby(range(len(examples)), key=lambda number: examples[number].document)
    found = [list(numbers) for _, numbers in documents]
    return [range(numbers[0], numbers[-1] + 1) for numbers in found]


def _pieces(tokens: _Tokens, sentences: range, *, room: int) -> list[_Piece]:
    """As few pieces of at most ``room`` tokens as the rule of cutting allows, at least one."""
    begins = tokens.bounds[sentences.start : sentences.stop]
    start, end = int(begins[0]), int(tokens.bounds[sentences.stop])
    if start == end:
        return [_Piece(start, end, sentences.start)]
    pieces = []
    while start < end:
        cut, following = _cut(tokens, start, min(start + room, end), end=end, begins=begins)
        # Of sentences that begin at the same place, all but the last have no token.
        sentence = sentences.start + int(np.searchsorted(begins, start, side="right")) - 1
        pieces.append(_Piece(start, cut, sentence, is_cut=following > cut))
        start = following
    return pieces


def _cut(tokens: _Tokens, start: int, limit: int, *, end: int, begins: Ints) -> tuple[int, int]:
    """Where a piece from ``start`` ends, ``limit`` at the latest, and where the next one begins."""
    if limit == end:
        return end, end
    for places in (begins, start + np.flatnonzero(tokens.is_first[start : limit + 1])):
        fitting = places[(places > start) & (places <= limit)]
        if len(fitting):
            return int(fitting[-1]), int(fitting[-1])
    following = np.flatnonzero(tokens.is_first[limit:end])
    return limit, limit + int(following[0]) if len(following) else end


def _place_of_word(sentence: str, number: int) -> str:
    """Where a word stands, by the place of the first of its sentence: in a file each has the next line."""
    path, colon, line = sentence.rpartition(":")
    return f"{path}:{int(line) + number}" if colon and line.isdecimal() else sentence


def _labels_of(examples: Sequence[WordsExample], words: Ints, labels: Labels | None) -> Ints | None:
    if any(each.tags is None for each in examples):
        return None
    assert labels is not None, "tags have names"
    tags = np.array(
        [
            labels.number(tag, _place_of_word(each.place, number))
            for each in examples
            for number, tag in enumerate(each.tags or ())
        ]
        + [IGNORED]
    )
    # Words of number -1 are no words: they get what stands at the end.
    return tags[words]
