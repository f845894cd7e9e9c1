"""What goes wrong on some rank: told by that rank while it can be heard, and known to all where they agree."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_bert_tp.config.command_line import USER_ERROR, tell_error
from megatron_bert_tp.config.environment import LaunchEnvironment
from megatron_bert_tp.errors import MegatronBertError, TrainingError

_LONGEST = 2000  # bytes of a failure that the other ranks get
_PREFIX = 2  # bytes in which its length stands; 0 is no failure


@contextmanager
def telling(environment: LaunchEnvironment) -> Iterator[None]:
    """Context manager inside the process group that prints what the user can mend and exits with 2.

    While a rank waits for its turn to tell, it is still connected, so that peers which wait for its messages
    go on waiting.  Without the group they would fail at once, and torchrun would end this rank in silence.
    """
    try:
        yield
    except (MegatronBertError, OSError) as error:
        tell_error(_text(error), environment)
        raise SystemExit(USER_ERROR) from error


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Context manager around what one rank does for all; every rank enters it, and it ends like a barrier.

    Where it fails on a rank, all ranks raise: rank 0 can tell it, and nobody waits for messages that never come.
    """
    failure: MegatronBertError | OSError | None = None
    try:
        yield
    except (MegatronBertError, OSError) as error:
        failure = error
    told = first_failure(None if failure is None else _text(failure), device)
    if failure is not None:
        raise failure
    if told is not None:
        raise TrainingError(told)


def first_failure(text: str | None, device: torch.device) -> str | None:
    """The text of the first rank that hands one in, cut to 2000 bytes; every rank must call it.

    None when all ranks hand in None.  ``device`` is that of the group's messages.
    """
    if not dist.is_initialized():
        return text
    own = _packed(text).to(device)
    all_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(all_ranks, own)
    return next(filter(None, map(_unpacked, all_ranks)), None)


def _packed(text: str | None) -> torch.Tensor:
    """``[2002]`` bytes: length, text, padding."""
    content = b"" if text is None else (text or "unknown failure").encode()[:_LONGEST]
    framed = len(content).to_bytes(_PREFIX, "big") + content
    return torch.frombuffer(bytearray(framed.ljust(_PREFIX + _LONGEST, b"\0")), dtype=torch.uint8)


def _unpacked(packed: torch.Tensor) -> str | None:
    content = bytes(packed.tolist())
    length = int.from_bytes(content[:_PREFIX], "big")
    # The cut may have split a character.
    return content[_PREFIX : _PREFIX + length].decode(errors="ignore") if length else None


def _text(error: MegatronBertError | OSError) -> str:
    """Message for the user: our own, or path, reason and way out of what the operating system refused."""
    if isinstance(error, MegatronBertError):
        return str(error)
    place = "" if error.filename is None else f"{error.filename}: "
    return f"{place}{error.strerror or error}; check the path, its permissions and the free space"
