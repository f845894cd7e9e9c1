"""The tokenizer files of a Hugging Face directory, so that `AutoTokenizer` gives the ids of the training."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from megatron_bert_tp.checkpoint.durable import read_object
from megatron_bert_tp.data.tokenizer import CONTINUATION, SPECIAL_TOKENS, Tokenizer
from megatron_bert_tp.errors import FormatError

VOCABULARY, LIBRARY, SETTINGS = "vocab.txt", "tokenizer.json", "tokenizer_config.json"
TOKENIZER_FILES = (VOCABULARY, LIBRARY, SETTINGS, "special_tokens_map.json", "added_tokens.json")
"""What is carried along from a Hugging Face directory into a checkpoint and out again."""

_LARGEST = 16 * 2**20  # bytes of tokenizer_config.json


def write_tokenizer(directory: Path, files: Mapping[str, Path], *, lowercase: bool | None, longest: int) -> None:
    """Copy the tokenizer files in ``files`` (by name), and make those that are missing.

    Files with a `tokenizer_config.json` come from `save_pretrained` and are complete: they are only copied.
    ``lowercase`` belongs to a ``vocab.txt`` without a ``tokenizer.json``; None takes it from the entries: a
    cased vocabulary has capital letters.  ``longest`` is the longest sequence in tokens.
    FormatError when there is neither of the two files.
    """
    unknown = sorted(files.keys() - set(TOKENIZER_FILES))
    if unknown:
        raise FormatError(f"{', '.join(unknown)}: not a tokenizer file; those are {', '.join(TOKENIZER_FILES)}")
    if VOCABULARY not in files and LIBRARY not in files:
        raise FormatError(f"the tokenizer is missing: neither {VOCABULARY} nor {LIBRARY} is given")
    for name, source in files.items():
        shutil.copyfile(source, directory / name)
    if SETTINGS in files:
        return
    tokenizer = _load(directory, lowercase)
    if LIBRARY in files:
        _complete_(directory)
    else:
        _save(_bert(tokenizer.vocabulary.entries, tokenizer.lowercase), directory)
    if VOCABULARY not in files and "" not in tokenizer.vocabulary.entries:
        lines = "".join(f"{entry}\n" for entry in tokenizer.vocabulary.entries)
        (directory / VOCABULARY).write_text(lines, encoding="utf-8")
    settings = json.dumps(_settings(tokenizer.lowercase, longest), indent=2)
    (directory / SETTINGS).write_text(settings + "\n", encoding="utf-8")


def said_lowercase(files: Mapping[str, Path]) -> bool | None:
    """Whether the settings among tokenizer files say that the vocabulary is uncased; None when they do not say."""
    if SETTINGS not in files:
        return None
    said = read_object(files[SETTINGS], largest=_LARGEST, error=FormatError).get("do_lower_case")
    return said if isinstance(said, bool) else None


def judged_lowercase(files: Mapping[str, Path]) -> bool | None:
    """Whether the entries of a ``vocab.txt`` among tokenizer files are uncased; None when there is none.

    DataError when it is no vocabulary.
    """
    if VOCABULARY not in files:
        return None
    entries = Tokenizer.load(files[VOCABULARY], lowercase=True).vocabulary.entries
    return not any(_is_cased(entry) for entry in entries)


def _load(directory: Path, lowercase: bool | None) -> Tokenizer:
    if (directory / LIBRARY).is_file():
        return Tokenizer.load(directory / LIBRARY, lowercase=True)
    tokenizer = Tokenizer.load(directory / VOCABULARY, lowercase=lowercase is not False)
    if lowercase is None:
        tokenizer.lowercase = not any(_is_cased(entry) for entry in tokenizer.vocabulary.entries)
    return tokenizer


def _is_cased(entry: str) -> bool:
    return entry != entry.lower() and not entry.startswith("[")  # [CLS] and [unused7] say nothing


def _bert(entries: tuple[str, ...], lowercase: bool) -> tokenizers.Tokenizer:
    """BERT's tokenizer of the `tokenizers` library, special tokens and sentence pairs included."""
    ids = {entry: number for number, entry in enumerate(entries) if entry}
    library = tokenizers.Tokenizer(
        models.WordPiece(ids, unk_token="[UNK]", continuing_subword_prefix=CONTINUATION)
    )
    library.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(prefix=CONTINUATION)
    library.add_special_tokens(list(SPECIAL_TOKENS))
    library.post_processor = _pairs(library)
    return library


def _complete_(directory: Path) -> None:
    """Give a `tokenizer.json` that only cuts text what a model's input needs: [CLS], [SEP] and pairs."""
    library = tokenizers.Tokenizer.from_file(str(directory / LIBRARY))
    if library.post_processor is None:
        library.add_special_tokens(list(SPECIAL_TOKENS))
        library.post_processor = _pairs(library)
        _save(library, directory)


def _pairs(library: tokenizers.Tokenizer) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, library.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )


def _save(library: tokenizers.Tokenizer, directory: Path) -> None:
    library.save(str(directory / LIBRARY))


def _settings(lowercase: bool, longest: int) -> dict[str, object]:
    tokens = {token.strip("[]").lower() + "_token": token for token in SPECIAL_TOKENS}
    return {
        **tokens,
        "do_lower_case": lowercase,
        "model_max_length": longest,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "tokenizer_class": "BertTokenizer",
    }
