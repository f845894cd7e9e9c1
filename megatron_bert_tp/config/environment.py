"""Who this process is among the processes of a launch; the one place that knows the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_bert_tp.errors import ConfigError

_WAY_OUT = "start with torchrun, which sets it, or unset RANK and WORLD_SIZE to run one process"
# Needed only when there are other processes to find and a GPU of one's own to choose.
_NEEDED_BY_MANY = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class LaunchEnvironment:
    """Place of this process; without a launcher, rank 0 of 1."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_address: str | None = None
    master_port: int | None = None
    is_launched: bool = False
    restarts: int = 0
    """How often the launcher, or SLURM, has started all processes anew."""
    has_store: bool = False
    """Whether the launcher keeps the store at which the ranks meet; else the first rank must."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which speaks for all."""
        return self.rank == 0


def read_environment() -> LaunchEnvironment:
    """Place of this process as torchrun's variables say; `ConfigError` where they do not fit together."""
    return environment_from(os.environ)


def environment_from(variables: Mapping[str, str]) -> LaunchEnvironment:
    """Place that ``variables`` describe: none of RANK and WORLD_SIZE, or all that torchrun sets."""
    if "RANK" not in variables and "WORLD_SIZE" not in variables:
        return LaunchEnvironment()
    _require(variables, ("RANK", "WORLD_SIZE"))
    world_size = _number(variables, "WORLD_SIZE", at_least=1)
    if world_size > 1:
        _require(variables, _NEEDED_BY_MANY)
    local_world_size = _number(variables, "LOCAL_WORLD_SIZE", at_least=1, default=1)
    port = _number(variables, "MASTER_PORT", at_least=0, below=2**16, default=0)
    return LaunchEnvironment(
        rank=_number(variables, "RANK", below=world_size),
        world_size=world_size,
        local_rank=_number(variables, "LOCAL_RANK", below=local_world_size, default=0),
        local_world_size=local_world_size,
        master_address=variables.get("MASTER_ADDR"),
        master_port=port or None,
        is_launched=True,
        restarts=_number(variables, "TORCHELASTIC_RESTART_COUNT", default=0)
        + _number(variables, "SLURM_RESTART_COUNT", default=0),
        has_store=variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def slurm_job() -> str | None:
    """What SLURM calls the job that this process is of; None outside of SLURM."""
    return os.environ.get("SLURM_JOB_ID") or None


def set_where_unset(variables: Mapping[str, str]) -> None:
    """Set environment variables of this process and its children that the user has not set."""
    for name, text in variables.items():
        os.environ.setdefault(name, text)


def _require(variables: Mapping[str, str], names: tuple[str, ...]) -> None:
    absent = [name for name in names if not variables.get(name)]
    if absent:
        found = ", ".join(f"{name}={variables[name]}" for name in ("RANK", "WORLD_SIZE") if name in variables)
        raise ConfigError(f"environment variable {', '.join(absent)} is missing while {found} is set; {_WAY_OUT}")


def _number(
    variables: Mapping[str, str],
    name: str,
    *,
    at_least: int = 0,
    below: int | None = None,
    default: int | None = None,
) -> int:
    if name not in variables and default is not None:
        return default
    text = variables[name]
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
    if number < at_least or (below is not None and number >= below):
        range_ = f"at least {at_least}" + ("" if below is None else f" and below {below}")
        raise ConfigError(f"environment variable {name}={text} must be an integer, {range_}; {_WAY_OUT}")
    return number
