"""Training of WordPiece vocabularies, over text that is read as a stream."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import normalizers, trainers

from megatron_bert_tp.data.byte_progress import ByteProgress
from megatron_bert_tp.data.corpus.facts import temporary
from megatron_bert_tp.data.preprocessing.documents import InputCounts, TextLayout, check_inputs, read_file
from megatron_bert_tp.data.preprocessing.pieces import Place
from megatron_bert_tp.data.refusals import writing
from megatron_bert_tp.data.tokenizer import CONTINUATION, SPECIAL_TOKENS, bert_tokenizer
from megatron_bert_tp.errors import DataError

_LARGEST_ALPHABET = 1000  # characters, as BERT's own trainer keeps
_PASSES = 3

Texts = Callable[[], Iterable[str]]
"""Gives the same texts each time that it is called."""


def train_tokenizer(
    inputs: list[Path],
    output: Path,
    *,
    size: int,
    layout: TextLayout | None = None,
    lowercase: bool = True,
    overwrite: bool = False,
) -> int:
    """Train a WordPiece vocabulary on the text of ``inputs``, write it to ``output`` and return its size."""
    total = check_inputs(inputs)
    if os.path.realpath(output) in set(map(os.path.realpath, inputs)):
        raise DataError(f"--output {output} would replace an input; choose another name")
    if output.exists() and not overwrite:
        raise DataError(f"{output}: exists already; choose another --output, or replace it with --overwrite")
    with ByteProgress("training a vocabulary", _PASSES * total) as progress:
        return train_wordpiece(lambda: _texts(inputs, layout or TextLayout(), progress), size, lowercase, output)


def train_wordpiece(texts: Texts, vocab_size: int, lowercase: bool, output: Path) -> int:
    """Train a WordPiece vocabulary, write it as a ``vocab.txt`` and return its size (<= ``vocab_size``).

    Same texts, same bytes: the library numbers the pieces of one character in the order of a hash
    map and breaks ties between merges by these numbers, so that they are found in a first pass and
    given to it in sorted order.  The texts are read three times, and memory grows with the number of
    different words alone.
    """
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    library = bert_tokenizer({}, lowercase)
    alphabet = _alphabet(texts, library.normalizer, limit=min(_LARGEST_ALPHABET, vocab_size // 8))
    _train(library, texts, alphabet, pieces=[], vocab_size=0)
    pieces = sorted(entry for entry in library.get_vocab() if entry.startswith(CONTINUATION))
    smallest = len(SPECIAL_TOKENS) + len(alphabet) + len(pieces)
    if not alphabet or vocab_size < smallest:
        raise DataError(
            f"a vocabulary of {vocab_size} entries cannot hold the {len(SPECIAL_TOKENS)} special tokens and "
            f"the characters of the text ({len(alphabet)}): give more text, or a size of at least "
            f"{max(smallest, 100)}"
        )
    library = bert_tokenizer({}, lowercase)
    _train(library, texts, alphabet, pieces=pieces, vocab_size=vocab_size)
    ids = library.get_vocab()
    with writing(output):
        _replace(output, "".join(f"{entry}\n" for entry in sorted(ids, key=ids.__getitem__)))
    return len(ids)


def _replace(path: Path, text: str) -> None:
    """Write a file so that a full disk or a kill leaves the old one: half a vocabulary would look like a whole."""
    fresh = temporary(path)
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _texts(inputs: list[Path], layout: TextLayout, progress: ByteProgress) -> Iterator[str]:
    for number, path in enumerate(inputs):
        read_before = 0
        for read in read_file(path, layout, Place(file=number), InputCounts()):
            progress.advance(read.num_packed - read_before)
            read_before = read.num_packed
            if read.piece is not None:
                yield read.piece.text


def _alphabet(texts: Texts, normalizer: normalizers.Normalizer, *, limit: int) -> list[str]:
    """The most frequent characters, sorted; equal counts in the order of code points."""
    counts: Counter[str] = Counter()
    for text in texts():
        counts.update(normalizer.normalize_str(text))
    kept = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))[:limit]
    return sorted(kept)


def _train(
    library: tokenizers.Tokenizer, texts: Texts, alphabet: list[str], *, pieces: list[str], vocab_size: int
) -> None:
    """Fill the library's vocabulary: special tokens, ``pieces``, ``alphabet``, then merges."""
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[*SPECIAL_TOKENS, *pieces],
        limit_alphabet=len(alphabet),
        initial_alphabet=alphabet,
        continuing_subword_prefix=CONTINUATION,
    )
    library.train_from_iterator(texts(), trainer)
