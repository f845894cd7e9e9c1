"""`python -m megatron_bert_tp.preprocess`: text to a tokenised corpus, or to a WordPiece vocabulary."""

import argparse
import difflib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bert_tp.config.command_line import run_command
from megatron_bert_tp.errors import DataError

if TYPE_CHECKING:
    from megatron_bert_tp.data.preprocessing.documents import TextLayout

_TRAIN = "train-tokenizer"
_INVALID = ("error", "replace", "drop-line")


def main(arguments: list[str]) -> int:
    """Make a corpus, or with ``train-tokenizer`` first a vocabulary; prints what was made."""
    trains = arguments[:1] == [_TRAIN]
    if not trains:
        _check_subcommand(arguments)
    given = _parser(trains).parse_args(arguments[1:] if trains else arguments)
    print(_train(given) if trains else _preprocess(given))
    return 0


def _preprocess(given: argparse.Namespace) -> str:
    # Here, not above: `--help` needs neither numpy nor tokenizers.
    from megatron_bert_tp.data.preprocessing.preprocess import preprocess

    report = preprocess(
        given.input,
        given.tokenizer,
        given.output,
        layout=_layout(given),
        lowercase=not given.cased,
        language=given.language,
        workers=given.workers,
        overwrite=given.overwrite,
    )
    return f"{given.output}\n{report}"


def _train(given: argparse.Namespace) -> str:
    from megatron_bert_tp.data.preprocessing.vocabulary_training import train_tokenizer

    size = train_tokenizer(
        given.input,
        given.output,
        size=given.size,
        layout=_layout(given),
        lowercase=not given.cased,
        overwrite=given.overwrite,
    )
    told = f"{given.output}: {size:,} entries"
    if size < given.size:
        told += f", not the {given.size:,} asked for: no more pieces occur twice in the text; more text gives more"
    return told


def _layout(given: argparse.Namespace) -> "TextLayout":
    from megatron_bert_tp.data.preprocessing.documents import TextLayout
    from megatron_bert_tp.data.preprocessing.lines import InvalidText

    return TextLayout(
        field=given.field,
        document_per_file=given.document_per_file,
        sentence_per_line=given.sentences_per_line,
        invalid_text=InvalidText(given.invalid_utf8),
    )


def _check_subcommand(arguments: list[str]) -> None:
    """DataError where the first argument is no file, but nearly the name of the subcommand."""
    first = arguments[0] if arguments else ""
    if difflib.get_close_matches(first.lower(), [_TRAIN], cutoff=0.7) and not Path(first).exists():
        raise DataError(f"{first!r} is neither a file nor a subcommand; did you mean {_TRAIN}?")


def _parser(trains: bool) -> argparse.ArgumentParser:
    program = f"python -m megatron_bert_tp.preprocess{' ' + _TRAIN if trains else ''}"
    epilog = f"Makes a corpus; `{_TRAIN} INPUT... --size N --output FILE` makes a vocabulary."
    parser = argparse.ArgumentParser(prog=program, epilog=epilog, allow_abbrev=False)
    add = parser.add_argument
    kinds = "text, JSON lines (.json, .jsonl, .ndjson), each also .gz, .xz or .zst; .parquet"
    add("input", nargs="+", type=Path, help=kinds)
    if trains:
        add("--size", type=_count, required=True, help="entries of the vocabulary")
        add("--output", type=Path, required=True, help="vocab.txt to write")
    else:
        add("--tokenizer", type=Path, required=True, help="vocab.txt or tokenizer.json")
        add("--output", type=Path, required=True, help="prefix of the .bin, .idx and .json to write")
        cores = len(os.sched_getaffinity(0))
        told = f"processes; the result is the same (default: the cores of this machine, {cores})"
        add("--workers", type=_count, default=cores, help=told)
        add("--language", default="en", help="language of the text, a code such as en, de, zh (default en)")
    add("--field", default="text", help="field of JSON lines, or column of Parquet (default text)")
    add("--cased", action="store_true", help="keep upper case and accents (a tokenizer.json says it itself)")
    add("--sentences-per-line", action="store_true", help="each line is a sentence already")
    add("--document-per-file", action="store_true", help="blank lines of a text file do not end a document")
    add("--invalid-utf8", choices=_INVALID, default="error", help="bytes that are not UTF-8 (default error)")
    add("--overwrite", action="store_true", help="replace what stands at --output")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(run_command(main, usage=_parser(trains=_TRAIN in sys.argv[1:2]).format_help()))
