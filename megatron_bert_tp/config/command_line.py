"""What the entry points share: help, one clear message for what the user can mend, exit codes."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_bert_tp.config.environment import LaunchEnvironment, read_environment
from megatron_bert_tp.config.load import Purpose, load_config, load_task
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.config.task_schema import TaskRun
from megatron_bert_tp.errors import ConfigError, ExitCode, MegatronBertError

_PIPE_CLOSED = 141  # as the shell has it for a process that SIGPIPE ends
_OTHERS = 0o077  # permissions of everyone but the owner
_HELP = {"-h", "--help"}


def run_command(
    main: Callable[[list[str]], int | None], *, usage: str, arguments: Sequence[str] | None = None
) -> int:
    """Exit code of ``main(arguments)``; help and user errors are printed once in a launch.

    An error that the user can mend becomes one message on stderr and the exit code of its class.
    Files that ``main`` makes are the user's alone (docs/security.md says how to share them on purpose).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    with _private_files():
        return _exit_code(main, usage, given)


@contextmanager
def _private_files() -> Iterator[None]:
    before = os.umask(_OTHERS)
    os.umask(before | _OTHERS)
    try:
        yield
    finally:
        os.umask(before)


def _exit_code(main: Callable[[list[str]], int | None], usage: str, given: list[str]) -> int:
    try:
        environment = read_environment()
    except MegatronBertError as error:
        tell_error(str(error), LaunchEnvironment())
        return error.exit_code
    try:
        if _HELP.intersection(given):
            _print_help(usage, environment)
            return 0
        return main(given) or 0
    except MegatronBertError as error:
        if not error.is_told:
            tell_error(str(error), environment)
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at its end
        return _PIPE_CLOSED


def tell_error(text: str, environment: LaunchEnvironment) -> None:
    """Print an error on stderr, once in a launch.

    A rank that is still there after `wait_for_first_rank` was hit alone, and tells it itself.
    """
    wait_for_first_rank(environment)
    speaker = "error" if environment.is_first else f"error on rank {environment.rank}"
    print(f"{speaker}: {text}", file=sys.stderr, flush=True)


def wait_for_first_rank(environment: LaunchEnvironment) -> None:
    """Let rank 0 tell an error that hits all ranks: it tells at once, and its exit makes torchrun end the others.

    On a busy machine a process needs seconds to end.
    """
    if not environment.is_first:
        time.sleep(5 + 0.5 * environment.local_rank)


def config_from_arguments(arguments: Sequence[str], usage: str) -> Config:
    """Settings of pretraining for ``CONFIG.yaml section.key=value ...`` and the world size of this launch."""
    path = _settings_file(arguments, usage)
    return load_config(path, arguments[1:], world_size=read_environment().world_size)


def task_from_arguments(arguments: Sequence[str], usage: str, purpose: Purpose = "finetune") -> TaskRun:
    """Settings of a task, as `config_from_arguments`."""
    path = _settings_file(arguments, usage)
    return load_task(path, arguments[1:], purpose=purpose, world_size=read_environment().world_size)


def _settings_file(arguments: Sequence[str], usage: str) -> Path:
    if not arguments:
        raise ConfigError(f"the settings file is missing\n\n{_short(usage)}")
    path = Path(arguments[0])
    if "=" in arguments[0] and not path.exists():
        raise ConfigError(f"the settings file comes first, before {arguments[0]}\n\n{_short(usage)}")
    return path


def _short(usage: str) -> str:
    return usage.strip().partition("\n\n")[0]


def _print_help(usage: str, environment: LaunchEnvironment) -> None:
    if environment.is_first:
        print(usage.rstrip(), flush=True)
