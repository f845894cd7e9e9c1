"""Text to rows of the model's input, with the way back from tokens to characters."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tokenizers
from tokenizers import normalizers

from megatron_bert_tp.checkpoint.durable import JSON, read_object
from megatron_bert_tp.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from megatron_bert_tp.errors import DataError, FormatError
from megatron_bert_tp.formats.tokenizer_files import LIBRARY, SETTINGS, VOCABULARY, said_lowercase, write_tokenizer
from megatron_bert_tp.formats.weights import ModelSource

Text = str | tuple[str, str]
"""A text or a pair."""
_LARGEST_SETTINGS = 16 * 2**20  # bytes of tokenizer_config.json
_ONE_TYPE = "the model has one token type only, and so reads no pairs"


@dataclass(frozen=True)
class Row:
    """One row of the input.  Everything is by token.

    ``offsets`` are characters of the text that the token is from, ``segments`` say which of the two texts that
    is (None: a token that only marks), ``words`` count the words of that text.  ``cut`` is the number of tokens
    before truncation, or None.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    segments: tuple[int | None, ...]
    words: tuple[int | None, ...]
    cut: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def taken(self, places: Iterable[int]) -> "Row":
        """The tokens at ``places``."""
        chosen = list(places)
        return Row(
            ids=tuple(self.ids[place] for place in chosen),
            types=tuple(self.types[place] for place in chosen),
            offsets=tuple(self.offsets[place] for place in chosen),
            segments=tuple(self.segments[place] for place in chosen),
            words=tuple(self.words[place] for place in chosen),
        )


def windows(num_tokens: int, *, size: int, overlap: int) -> list[range]:
    """Windows of at most ``size`` tokens over all, two neighbours with ``overlap`` in common.

    An overlap that is no smaller than the window shrinks to half of it.
    """
    if num_tokens <= size:
        return [range(num_tokens)]
    step = size - (overlap if overlap < size else size // 2)
    num_windows = 1 + -(-(num_tokens - size) // step)
    return [range(number * step, min(number * step + size, num_tokens)) for number in range(num_windows)]


def longest_first(first: int, second: int, *, room: int) -> tuple[int, int]:
    """How many tokens of two texts stay where there is room for so many: the longer text loses tokens first.

    Where both are longer than half of the room they share it, and the longer one, of two alike ones the second,
    has what is odd.
    """
    if first + second <= room:
        return first, second
    shorter = min(first, second, room // 2)
    return (room - shorter, shorter) if first > second else (shorter, room - shorter)


class TextEncoder:
    """Texts and pairs with [CLS] and [SEP], as `transformers` encodes them; "[MASK]" in a text is no text."""

    def __init__(self, library: tokenizers.Tokenizer, *, longest: int, num_types: int) -> None:
        """``longest`` is in tokens; a row has token types below ``num_types``."""
        self._library, self.longest, self._num_types = library, longest, num_types
        self.cls_id, self.sep_id, self.mask_id = map(self._id, ("[CLS]", "[SEP]", "[MASK]"))
        self.unknown_id = self._id("[UNK]")

    def row(self, text: str, partner: str | None = None) -> Row:
        """Row of a text or a pair; what is too long loses tokens at the end, of a pair the longer text first."""
        whole = self._encode(text, partner)
        if len(whole) <= self.longest:
            return whole
        self._library.enable_truncation(self.longest, strategy="longest_first")
        row = self._encode(text, partner, cut=len(whole))
        self._library.no_truncation()
        return row

    def windowed_rows(self, first: str, second: str, *, size: int, overlap: int) -> list[Row]:
        """Rows of at most ``size`` tokens: the whole ``first`` text, each with another window of the ``second``.

        Where the first text leaves no more room than the overlap, that shrinks to half of the room.
        """
        whole = self._encode(first, second)
        places = [place for place, segment in enumerate(whole.segments) if segment == 1]
        room = min(size, self.longest) - (len(whole) - len(places))
        if not places:
            raise DataError("the context has no token; give a text with letters")
        if room < 1:
            raise DataError(
                f"the question has {whole.segments.count(0)} tokens and leaves no room for the context among "
                f"{min(size, self.longest)}; shorten it"
            )
        before, after = range(places[0]), range(places[-1] + 1, len(whole))
        return [
            whole.taken([*before, *places[window.start : window.stop], *after])
            for window in windows(len(places), size=room, overlap=overlap)
        ]

    def encoded(self, texts: Sequence[Text]) -> list[tokenizers.Encoding]:
        """The library's encodings of many texts and pairs at once, [CLS] and [SEP] included, however long."""
        encodings = self._library.encode_batch(list(texts))
        if any(max(encoding.type_ids, default=0) >= self._num_types for encoding in encodings):
            raise DataError(_ONE_TYPE)
        return list(encodings)

    def encoded_words(self, sentences: Sequence[Sequence[str]]) -> list[tokenizers.Encoding]:
        """The library's encodings of sentences that are words already, without [CLS] and [SEP].

        Their ``word_ids`` tell the word of each token; a word of nothing but control characters has no token.
        """
        return list(
            self._library.encode_batch(
                [list(words) for words in sentences], is_pretokenized=True, add_special_tokens=False
            )
        )

    def token(self, number: int) -> str:
        """Entry of the vocabulary."""
        return str(self._library.id_to_token(number) or "")

    def text_of(self, number: int) -> str:
        """One token as text."""
        return str(self._library.decode([number], skip_special_tokens=False))

    def joined(self, pieces: list[str]) -> str:
        """Pieces of words as text."""
        decoder = self._library.decoder
        return " ".join(pieces) if decoder is None else str(decoder.decode(pieces))

    def _id(self, token: str) -> int:
        number = self._library.token_to_id(token)
        assert number is not None, token  # `open_encoder` has seen to it
        return int(number)

    def _encode(self, text: str, partner: str | None, *, cut: int | None = None) -> Row:
        encoding = self._library.encode(text, partner)
        if max(encoding.type_ids) >= self._num_types:
            raise DataError(_ONE_TYPE)
        return Row(
            ids=tuple(encoding.ids),
            types=tuple(encoding.type_ids),
            offsets=tuple(encoding.offsets),
            segments=tuple(encoding.sequence_ids),
            words=tuple(encoding.word_ids),
            cut=cut,
        )


def open_encoder(source: ModelSource, path: Path) -> TextEncoder:
    """Tokenizer of a model; FormatError when it has none, or one with more entries than the model has words."""
    if VOCABULARY not in source.tokenizer_files and LIBRARY not in source.tokenizer_files:
        raise FormatError(f"{path}: has no tokenizer; put the vocab.txt or tokenizer.json of its training there")
    settings = _settings(source.tokenizer_files.get(SETTINGS))
    library = _library(source, settings)
    size = max(library.get_vocab(with_added_tokens=True).values()) + 1
    if size > source.shape.vocab_size:
        raise FormatError(
            f"{path}: the tokenizer has {size} entries, but the model has {source.shape.vocab_size} words; "
            "is it the tokenizer of another model?"
        )
    longest, positions = settings.get("model_max_length"), source.shape.max_position_embeddings
    if isinstance(longest, int) and len(SPECIAL_TOKENS) < longest < positions:
        positions = longest
    return TextEncoder(library, longest=positions, num_types=source.shape.type_vocab_size)


def _settings(path: Path | None) -> Mapping[str, JSON]:
    """Content of a `tokenizer_config.json`."""
    return {} if path is None else read_object(path, largest=_LARGEST_SETTINGS, error=FormatError)


def _library(source: ModelSource, settings: Mapping[str, JSON]) -> tokenizers.Tokenizer:
    """Tokenizer with [CLS], [SEP] and pairs, made by the one function that also makes exported files."""
    files = {name: path for name, path in source.tokenizer_files.items() if name != SETTINGS}
    # Where the user has it: an error of the copy below would name a folder that is gone by then.
    Tokenizer.load(files[LIBRARY] if LIBRARY in files else files[VOCABULARY], lowercase=True)
    said = said_lowercase(source.tokenizer_files)
    lowercase = source.lowercase if said is None else said
    with TemporaryDirectory(prefix="tokenizer-") as folder:
        directory = Path(folder)
        write_tokenizer(directory, files, lowercase=lowercase, longest=source.shape.max_position_embeddings)
        library = tokenizers.Tokenizer.from_file(str(directory / LIBRARY))
    if LIBRARY not in files:
        library.normalizer = _normalizer(library.normalizer, settings)
    known = {token.content for token in library.get_added_tokens_decoder().values()}
    library.add_special_tokens([token for token in SPECIAL_TOKENS if token not in known])
    library.no_truncation()
    library.no_padding()
    return library


def _normalizer(made: normalizers.BertNormalizer, settings: Mapping[str, JSON]) -> normalizers.BertNormalizer:
    """The normalizer of a ``vocab.txt``, with what its settings say of accents and Chinese characters."""
    accents = settings.get("strip_accents")
    return normalizers.BertNormalizer(
        lowercase=made.lowercase,
        strip_accents=accents if isinstance(accents, bool) else None,
        handle_chinese_chars=settings.get("tokenize_chinese_chars") is not False,
    )
