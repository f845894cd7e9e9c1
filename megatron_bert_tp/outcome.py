"""`python -m megatron_bert_tp.outcome CONFIG.yaml section.key=value ...`: how the run of these settings ended."""

import sys
from pathlib import Path

from megatron_bert_tp.config.command_line import run_command
from megatron_bert_tp.config.load import load_any
from megatron_bert_tp.errors import ConfigError, ExitCode
from megatron_bert_tp.reliability.outcome import OutcomeFile

USAGE = """\
usage: python -m megatron_bert_tp.outcome [--mark | --since MARK] [--processes N] CONFIG.yaml [section.key=value]

Tells how the run of these settings ended, and exits with its code; 1 when nothing is known (docs/reliability.md).
torchrun turns every failure of a run into 1, so the scripts in launch/ ask here.  Takes no torch.

  --mark          print a mark of the outcome that stands now, "none" without one, and exit with 0
  --since MARK    tell of another outcome than that one alone
  --processes N   check too that the settings fit so many processes
"""
_NONE = "none"
_OPTIONS = {"--since", "--processes"}


def main(arguments: list[str]) -> int:
    """Print one line; the exit code is that of the run."""
    options, settings = _parsed(arguments)
    if not settings:
        raise ConfigError(f"the settings file is missing\n\n{USAGE.splitlines()[0]}")
    processes = options.get("--processes", "")
    world_size = int(processes) if processes.isascii() and processes.isdecimal() else None
    config = load_any(Path(settings[0]), settings[1:], world_size=world_size)
    file = OutcomeFile(Path(config.run.directory))
    mark = mark_of(file.path)
    if "--mark" in options:
        print(mark)
        return ExitCode.FINISHED
    outcome = file.read() if mark != options.get("--since", _NONE) else None
    if outcome is None:
        print(f"no rank has written {file.path}, so nothing is known of the end of this run", file=sys.stderr)
        return ExitCode.BUG
    print(outcome.line())
    return outcome.code


def mark_of(path: Path) -> str:
    """What tells the outcome at ``path`` from those before and after it, whatever the clocks say."""
    try:
        found = path.stat()
    except OSError:
        return _NONE
    return f"{found.st_ino}-{found.st_mtime_ns}"


def _parsed(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options, which come first, and the rest."""
    left, options = list(arguments), dict[str, str]()
    while left and left[0].startswith("--"):
        name, equals, value = left.pop(0).partition("=")
        if name not in _OPTIONS | {"--mark"} or (name in _OPTIONS and not equals and not left):
            raise ConfigError(f"{name} is no option, or its value is missing\n\n{USAGE.splitlines()[0]}")
        options[name] = left.pop(0) if name in _OPTIONS and not equals else value
    return options, left


if __name__ == "__main__":
    sys.exit(run_command(main, usage=USAGE))
