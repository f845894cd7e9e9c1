"""`python -m megatron_bert_tp.convert`: checkpoints to Hugging Face directories, and back."""

import argparse
import sys
from pathlib import Path

from megatron_bert_tp.config.command_line import run_command


def main(arguments: list[str]) -> int:
    """Convert, and print what was written where."""
    # Here, not above: `--help` needs no torch.
    from megatron_bert_tp.formats.convert import from_huggingface, to_huggingface

    given = _parser().parse_args(arguments)
    if given.direction == "to-hf":
        print(to_huggingface(given.checkpoint, given.out))
    else:
        print(from_huggingface(given.directory, given.out))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_bert_tp.convert",
        usage="%(prog)s to-hf CHECKPOINT OUT\n       %(prog)s from-hf DIRECTORY OUT",
        epilog="OUT must not exist, or be empty.",
        allow_abbrev=False,
    )
    ways = parser.add_subparsers(dest="direction", required=True, metavar="to-hf | from-hf")
    export = ways.add_parser(
        "to-hf", help="a checkpoint to a directory that transformers reads", allow_abbrev=False
    )
    export.add_argument("checkpoint", type=Path, help="checkpoint, folder of checkpoints, or folder of a run")
    bring = ways.add_parser("from-hf", help="such a directory to a checkpoint of step 0", allow_abbrev=False)
    bring.add_argument("directory", type=Path, help="config.json and model.safetensors (or its shards)")
    for way in (export, bring):
        way.add_argument("out", type=Path, help="folder to write")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, usage=_parser().format_help()))
