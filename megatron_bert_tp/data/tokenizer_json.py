"""What a ``tokenizer.json`` may ask of the library that runs it.

The file is a program of small steps.  Some of them take a regular expression, which can take longer than anyone
waits, and some replace a letter by any text, which can fill all memory.  BERT's tokenizers need none of these.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

from megatron_bert_tp.errors import DataError

_ALLOWED = {
    "normalizer": {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Strip", "StripAccents"},
    "pre_tokenizer": {"BertPreTokenizer", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"},
    "decoder": {"WordPiece"},
}
_SEQUENCES = ("normalizers", "pretokenizers", "decoders")
_MOST_STEPS = 20
_LARGEST_ID = 2**24  # no file of a credible size has so many entries
_LONGEST_WORD = 1000  # characters; the work on a word is quadratic in it


def checked_settings(text: str, path: Path) -> Mapping[str, object]:
    """The JSON object of a WordPiece ``tokenizer.json`` that is harmless to run; `DataError` otherwise.

    ``text`` is the content of ``path``; the library has not seen it yet.
    """
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a tokenizer.json of the `tokenizers` library: {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        raise DataError(f"{path}: not a tokenizer.json of the `tokenizers` library: it has no model")
    for part, allowed in _ALLOWED.items():
        _check_steps(part, list(_steps(settings.get(part), depth=0)), allowed, path)
    _check_sizes(settings["model"], settings.get("added_tokens"), path)
    return settings


def _steps(value: object, *, depth: int) -> Iterator[object]:
    """Types of the steps of a part, those in sequences too."""
    if value is None:
        return
    if not isinstance(value, dict) or depth > 3:
        yield "something else"
    elif value.get("type") != "Sequence":
        yield value.get("type")
    else:
        inner = [value.get(name) for name in _SEQUENCES]
        for step in chain.from_iterable(each for each in inner if isinstance(each, list)):
            yield from _steps(step, depth=depth + 1)


def _check_steps(part: str, steps: list[object], allowed: set[str], path: Path) -> None:
    strange = [step for step in steps if not isinstance(step, str) or step not in allowed]
    if strange or len(steps) > _MOST_STEPS:
        said = f"{strange[0]!r:.50}" if strange else f"{len(steps)} steps"
        raise DataError(
            f"{path}: its {part} holds {said}, but at most {_MOST_STEPS} of {', '.join(sorted(allowed))} are run "
            "here (others can take forever or fill all memory); use the vocab.txt of the same model"
        )


def _check_sizes(model: Mapping[str, object], added: object, path: Path) -> None:
    vocabulary = model.get("vocab")
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    numbers = [number for number in ids if isinstance(number, int)]
    if max(numbers, default=0) >= _LARGEST_ID:
        raise DataError(f"{path}: the id {max(numbers)} is not credible; ids must be below {_LARGEST_ID}")
    longest = model.get("max_input_chars_per_word", 0)
    if isinstance(longest, int) and longest > _LONGEST_WORD:
        raise DataError(
            f"{path}: max_input_chars_per_word is {longest}, but must be at most {_LONGEST_WORD}; BERT has 100"
        )
