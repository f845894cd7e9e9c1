"""`python -m megatron_bert_tp.convert`: one checkpoint format into another, and what a file is."""

import sys

from megatron_bert_tp.config.command_line import run_command
from megatron_bert_tp.formats.arguments import parser


def main(arguments: list[str]) -> int:
    """Do what the arguments say, and print what was written where."""
    given = parser().parse_args(arguments)
    # Here, not above: `--help` needs no torch.
    from megatron_bert_tp.formats.commands import COMMANDS

    for line in COMMANDS[given.command](given):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, usage=parser().format_help()))
