"""`python -m megatron_bert_tp.check_data`: every number of a corpus looked at, and a report of what is in it."""

import argparse
import json
import sys
from pathlib import Path

from megatron_bert_tp.config.command_line import run_command
from megatron_bert_tp.errors import DataError

DAMAGED = 1


def main(arguments: list[str]) -> int:
    """Report on each corpus; 1 when one of them is damaged or missing, which is told on stderr."""
    # Here, not above: `--help` needs neither numpy nor tokenizers.
    from megatron_bert_tp.data.corpus.report import scan_corpus
    from megatron_bert_tp.data.tokenizer import Tokenizer

    given = _parser().parse_args(arguments)
    tokenizer = Tokenizer.load(given.tokenizer, not given.cased) if given.tokenizer else None
    found, problems = [], []
    for prefix in given.prefix:
        try:
            report = scan_corpus(prefix, tokenizer)
        except DataError as error:
            problems.append(str(error))
            found.append({"prefix": str(prefix), "problems": [str(error)]})
            continue
        problems += report.problems
        found.append(report.as_dict())
        if not given.json:
            print("\n".join(report.lines()))
    if given.json:
        print(json.dumps(found, indent=2))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return DAMAGED if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_bert_tp.check_data",
        description="Scans corpora: exit code 0 when they are sound, 1 when one is damaged or missing.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("prefix", nargs="+", type=Path, metavar="PREFIX", help="corpus without its ending (.bin, .idx, .json)")
    add("--tokenizer", type=Path, help="vocab.txt or tokenizer.json that the ids are compared with")
    add("--cased", action="store_true", help="the corpus kept upper case (a tokenizer.json says it itself)")
    add("--json", action="store_true", help="print a JSON list with an object for each corpus instead")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, usage=_parser().format_help()))
