"""WordPiece vocabularies over the `tokenizers` library: reading and encoding."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from megatron_bert_tp.data.refusals import reading
from megatron_bert_tp.data.tokenizer_json import checked_settings
from megatron_bert_tp.errors import DataError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUATION = "##"
_LARGEST_FILE = 64 * 2**20  # bytes; the largest public vocabularies are under 20 MB


@dataclass(frozen=True)
class Vocabulary:
    """The entries of a WordPiece vocabulary, and what masking and batches have to know of them."""

    entries: tuple[str, ...]
    """``[size]`` text of each id; an id that the file leaves out is an empty string."""
    pad_id: int
    unknown_id: int
    cls_id: int
    sep_id: int
    mask_id: int

    @property
    def size(self) -> int:
        """Number of ids."""
        return len(self.entries)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of [PAD], [UNK], [CLS], [SEP] and [MASK]."""
        return self.pad_id, self.unknown_id, self.cls_id, self.sep_id, self.mask_id

    @cached_property
    def starts_word(self) -> npt.NDArray[np.bool_]:
        """``[size]``, False for the pieces (``##ing``) that go on with a word."""
        return np.array([not entry.startswith(CONTINUATION) for entry in self.entries])

    @cached_property
    def ordinary_ids(self) -> npt.NDArray[np.int64]:
        """``[size - 5]`` every id that is not special."""
        return np.setdiff1d(np.arange(self.size), self.special_ids)

    @classmethod
    def of(cls, entries: Sequence[str], source: Path) -> "Vocabulary":
        """Vocabulary of the entries of ``source``; DataError when a special token is not among them."""
        ids = {entry: number for number, entry in enumerate(entries)}
        missing = [token for token in SPECIAL_TOKENS if token not in ids]
        if missing:
            raise DataError(
                f"{source}: a vocabulary must contain {', '.join(SPECIAL_TOKENS)}; {', '.join(missing)} "
                f"not found among its {len(entries)} entries. Use a BERT vocabulary, or train one with "
                "`python -m megatron_bert_tp.preprocess train-tokenizer`"
            )
        return cls(tuple(entries), *(ids[token] for token in SPECIAL_TOKENS))


class Tokenizer:
    """Text to token ids and back; special tokens are never added, nor read from the text."""

    def __init__(self, library: tokenizers.Tokenizer, vocabulary: Vocabulary, *, sha256: str, lowercase: bool):
        self.library = library
        """The tokenizer of the `tokenizers` library."""
        self.vocabulary = vocabulary
        self.sha256 = sha256
        """SHA-256 of the file that the tokenizer was read from."""
        self.lowercase = lowercase
        """Whether text is lowercased; for a ``tokenizer.json``, whether its normalizer says so."""

    @classmethod
    def load(cls, path: Path, lowercase: bool) -> "Tokenizer":
        """Tokenizer of a ``vocab.txt`` or, where the name ends in ``.json``, a ``tokenizer.json``.

        ``lowercase`` belongs to ``vocab.txt`` alone.  DataError when the file is missing, is not a
        WordPiece vocabulary, or has no [MASK] or other special token.
        """
        content = _read(path)
        sha256 = hashlib.sha256(content).hexdigest()
        text = _decode(content, path)
        if path.suffix == ".json":
            library, vocabulary, lowercase = _from_json(text, path)
        else:
            vocabulary = Vocabulary.of(_entries(text, path), path)
            library = bert_tokenizer({entry: n for n, entry in enumerate(vocabulary.entries)}, lowercase)
        return cls(library, vocabulary, sha256=sha256, lowercase=lowercase)

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.vocabulary.size

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        encodings = self.library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Vocabulary entry of each id."""
        return [self.vocabulary.entries[number] for number in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text: pieces joined to words, special tokens left out."""
        special = set(self.vocabulary.special_ids)
        text: str = self.library.decode([int(number) for number in ids if number not in special])
        return text


def bert_tokenizer(ids: dict[str, int], lowercase: bool) -> tokenizers.Tokenizer:
    """BERT's tokenizer: clean, lowercase and strip accents, split at spaces and punctuation, WordPiece."""
    library = tokenizers.Tokenizer(
        models.WordPiece(ids, unk_token="[UNK]", continuing_subword_prefix=CONTINUATION)
    )
    library.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(prefix=CONTINUATION)
    return library


def _from_json(text: str, path: Path) -> tuple[tokenizers.Tokenizer, Vocabulary, bool]:
    """Tokenizer, vocabulary and lowercasing of a ``tokenizer.json`` whose model is WordPiece."""
    settings = checked_settings(text, path)
    try:
        library = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path}: not a tokenizer.json of the `tokenizers` library: {error}") from error
    model = settings["model"]
    assert isinstance(model, dict)
    if model.get("type") != "WordPiece" or model.get("continuing_subword_prefix") != CONTINUATION:
        raise DataError(
            f"{path}: the model must be WordPiece with the prefix {CONTINUATION!r}, not {model.get('type')!r} "
            f"with {model.get('continuing_subword_prefix')!r}; use a BERT vocab.txt or tokenizer.json"
        )
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True  # "[MASK]" in a text is text
    ids = library.get_vocab(with_added_tokens=True)
    entries = [""] * (max(ids.values(), default=-1) + 1)
    for entry, number in ids.items():
        entries[number] = entry
    normalizer = settings.get("normalizer")
    lowercase = isinstance(normalizer, dict) and bool(normalizer.get("lowercase", False))
    return library, Vocabulary.of(entries, path), lowercase


def _entries(text: str, path: Path) -> list[str]:
    """Lines of a ``vocab.txt``; the line number from 0 is the id."""
    entries = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    repeated = [entry for entry, count in Counter(entries).items() if count > 1]
    if repeated:
        lines = [n for n, entry in enumerate(entries, start=1) if entry == repeated[0]]
        raise DataError(
            f"{path}: entries must be unique, but {repeated[0]!r} stands in lines {lines[:5]}; remove the copies"
        )
    return entries


def _read(path: Path) -> bytes:
    """Content of a vocabulary file that exists and has a credible size."""
    if path.is_dir():
        inside = [str(path / name) for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
        raise DataError(f"{path}: is a directory; give the file in it: {' or '.join(inside) or 'none is there'}")
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; give a BERT vocab.txt or tokenizer.json, or train one with "
            "`python -m megatron_bert_tp.preprocess train-tokenizer`"
        )
    size = path.stat().st_size
    if not 0 < size <= _LARGEST_FILE:
        raise DataError(
            f"{path}: a vocabulary has 1 to {_LARGEST_FILE} bytes, this file has {size}; is it another file?"
        )
    with reading(path):
        return path.read_bytes()


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; save the vocabulary as UTF-8") from error
