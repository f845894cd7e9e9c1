"""`python -m megatron_bert_tp.preprocess`: text to a tokenised corpus, or to a WordPiece vocabulary."""

import argparse
import sys
from pathlib import Path

from megatron_bert_tp.config.command_line import run_command

_TRAIN = "train-tokenizer"


def main(arguments: list[str]) -> int:
    """Make a corpus, or with ``train-tokenizer`` first a vocabulary; prints what was made."""
    # Here, not above: `--help` needs neither numpy nor tokenizers.
    from megatron_bert_tp.data.preprocess import preprocess, train_tokenizer
    from megatron_bert_tp.data.text import TextLayout

    trains = arguments[:1] == [_TRAIN]
    given = _parser(trains).parse_args(arguments[1:] if trains else arguments)
    layout = TextLayout(
        field=given.field,
        document_per_file=given.document_per_file,
        sentence_per_line=given.sentences_per_line,
    )
    lowercase = not given.cased
    if trains:
        size = train_tokenizer(given.input, given.output, size=given.size, layout=layout, lowercase=lowercase)
        print(f"{given.output}: {size:,} entries")
        return 0
    options = {"layout": layout, "lowercase": lowercase, "workers": given.workers}
    print(f"{given.output}: {preprocess(given.input, given.tokenizer, given.output, **options)}")
    return 0


def _parser(trains: bool) -> argparse.ArgumentParser:
    program = f"python -m megatron_bert_tp.preprocess{' ' + _TRAIN if trains else ''}"
    epilog = f"Makes a corpus; `{_TRAIN} INPUT... --size N --output FILE` makes a vocabulary."
    parser = argparse.ArgumentParser(prog=program, epilog=epilog, allow_abbrev=False)
    add = parser.add_argument
    add("input", nargs="+", type=Path, help="text, or JSON lines (.json, .jsonl, .ndjson)")
    if trains:
        add("--size", type=_count, required=True, help="entries of the vocabulary")
        add("--output", type=Path, required=True, help="vocab.txt to write")
    else:
        add("--tokenizer", type=Path, required=True, help="vocab.txt or tokenizer.json")
        add("--output", type=Path, required=True, help="prefix of the .bin, .idx and .json to write")
        add("--workers", type=_count, default=1, help="processes; the result is the same (default 1)")
    add("--field", default="text", help="field of the text in JSON lines (default text)")
    add("--cased", action="store_true", help="keep upper case and accents (a tokenizer.json says it itself)")
    add("--sentences-per-line", action="store_true", help="each line is a sentence already")
    add("--document-per-file", action="store_true", help="blank lines of a text file do not end a document")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(run_command(main, usage=_parser(trains=_TRAIN in sys.argv[1:2]).format_help()))
