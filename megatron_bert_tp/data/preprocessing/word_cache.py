"""Sentences to token ids by looking words up: several times as fast as `tokenizers`, with the same result.

BERT's normalizer and pre-tokenizer look at one character at a time and never across a space.  So the ids of a
sentence are those of its words, cut at spaces, one after the other; and most words have been seen before.
"""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.data.corpus.writer import token_type
from megatron_bert_tp.data.tokenizer import Tokenizer

_MOST_WORDS = 250_000  # about 50 MB
_LONGEST_KEPT = 40  # characters; longer words are rarely met again
_LONGEST_WHOLE = 20_000  # characters that go to the library at once: it takes 400 bytes for each
_ALONE = r"!-/:-@\[-`{-~\u3001\u3002\u4e00-\u9fff\uff01\uff0c\uff1f"  # each of these is a word of its own
_SHORTER = re.compile(rf"(?s).{{0,{_LONGEST_WHOLE}}}[{_ALONE}]|.+?[{_ALONE}]|.+")


class Encoded(NamedTuple):
    """Token ids of sentences, back to back, and the number of each sentence's."""

    tokens: npt.NDArray[np.integer]
    lengths: npt.NDArray[np.int64]


class WordCache:
    """Encodes sentences, and keeps the ids of the words that it has met."""

    def __init__(self, tokenizer: Tokenizer):
        self._library = tokenizer.library
        self._token_type = token_type(tokenizer.size)
        self._is_by_words = is_by_words(tokenizer)
        self._known: dict[str, bytes] = {}

    def encode(self, sentences: Sequence[str]) -> Encoded:
        """Ids of all sentences in the number format of the corpus; those without tokens have length 0."""
        rows = self._by_words(sentences) if self._is_by_words else self._ids(sentences)
        sizes = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        tokens: npt.NDArray[np.integer] = np.frombuffer(b"".join(rows), dtype=self._token_type)
        return Encoded(tokens, sizes // self._token_type.itemsize)

    def _by_words(self, sentences: Sequence[str]) -> list[bytes]:
        words = [sentence.split(" ") for sentence in sentences]
        missing = self._missing(words)
        long = [word for word in missing if len(word) > _LONGEST_KEPT]
        short = missing.difference(long)
        self._known.update(zip(short, self._ids(list(short)), strict=True))
        self._known.update({word: self._long_word(word) for word in long})
        known = self._known.__getitem__
        rows = [b"".join(map(known, sentence)) for sentence in words]
        for word in long:
            del self._known[word]
        return rows

    def _missing(self, words: Iterable[Iterable[str]]) -> set[str]:
        met = set(chain.from_iterable(words))
        missing = met.difference(self._known)
        if len(self._known) + len(missing) > _MOST_WORDS:
            self._known.clear()
            return met
        return missing

    def _long_word(self, word: str) -> bytes:
        parts = [word] if len(word) <= _LONGEST_WHOLE else _SHORTER.findall(word)
        return b"".join(self._ids([part])[0] for part in parts)

    def _ids(self, texts: Sequence[str]) -> list[bytes]:
        encodings = self._library.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self._token_type).tobytes() for encoding in encodings]


def is_by_words(tokenizer: Tokenizer) -> bool:
    """Whether the ids of a text are those of its words, as with BERT's own normalizer and pre-tokenizer.

    Chinese characters must be words of their own: long words are cut at them.
    """
    settings = json.loads(tokenizer.library.to_str())
    kinds = [(settings[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer")]
    special = all(token["special"] for token in settings["added_tokens"])
    if not special or kinds != ["BertNormalizer", "BertPreTokenizer"]:
        return False
    return bool(settings["normalizer"]["handle_chinese_chars"])
