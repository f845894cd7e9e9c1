"""What the ranks that save or choose a checkpoint tell each other: all of them go on, or all raise the same."""

from collections.abc import Callable
from typing import Protocol

from megatron_bert_tp.errors import CheckpointError, MegatronBertError

_DONE, _FAILED = "+", "-"


class Ranks(Protocol):
    """All ranks of a launch, which make the same calls in the same order (`parallel.agreement.Agreement`)."""

    @property
    def rank(self) -> int:
        """This one."""

    @property
    def size(self) -> int:
        """How many there are."""

    def texts(self, text: str | None) -> list[str | None]:
        """The text of every rank, cut to some 2000 bytes."""


def told_by_all(ranks: Ranks, work: Callable[[], str], error: type[CheckpointError]) -> list[str]:
    """Do this rank's part of the work, and give what every rank tells of its own.

    Where a part fails, every rank raises ``error`` with the reason of the first rank that has one.  A bug keeps
    its class and traceback on the rank that has it.
    """
    failure: Exception | None = None
    try:
        own = _DONE + work()
    except Exception as caught:  # whatever it is, the other ranks wait for the answer of this one
        failure, own = caught, _FAILED + _reason(caught, ranks.rank)
    told = [text or _DONE for text in ranks.texts(own)]
    reason = next((text.removeprefix(_FAILED) for text in told if text.startswith(_FAILED)), None)
    if reason is None:
        return [text.removeprefix(_DONE) for text in told]
    if failure is not None and not isinstance(failure, MegatronBertError | OSError):
        raise failure
    raise error(reason) from failure


def _reason(failure: Exception, rank: int) -> str:
    """What the others are told; a bug is named by its class, since its message alone says little."""
    if isinstance(failure, MegatronBertError | OSError):
        return str(failure)
    return f"{type(failure).__name__} on rank {rank}: {failure}"
