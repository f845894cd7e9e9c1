"""`python -m megatron_bert_tp.convert`: one checkpoint format into another, and what a file is."""

import sys

from megatron_bert_tp.checkpoint.durable import printable
from megatron_bert_tp.config.command_line import run_command
from megatron_bert_tp.errors import MegatronBertError
from megatron_bert_tp.formats.arguments import parser


def main(arguments: list[str]) -> int:
    """Do what the arguments say, and print what was written where."""
    given = parser().parse_args(arguments)
    # Here, not above: `--help` needs no torch.
    from megatron_bert_tp.formats.commands import COMMANDS

    try:
        for line in COMMANDS[given.command](given):
            print(_for_people(line))
    except MegatronBertError as error:
        raise type(error)(_for_people(str(error))) from error
    return 0


def _for_people(text: str) -> str:
    """Text in which names from files cannot steer the terminal; lines stay lines."""
    return "\n".join(printable(line) for line in text.split("\n"))


if __name__ == "__main__":
    sys.exit(run_command(main, usage=parser().format_help()))
