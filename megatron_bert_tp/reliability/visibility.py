"""Whether a folder is the same one for all ranks: a token file, written by the first, must be seen by each."""

import errno
import os
import secrets
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from megatron_bert_tp.errors import DirectoryError
from megatron_bert_tp.parallel.agreement import Agreement

_PATIENCE = 5.0
"""Seconds in which a token may appear: network file systems remember for seconds what was not there."""
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


def check_visible(
    directory: Path,
    agreement: Agreement,
    *,
    what: str = "run.directory",
    may_be_read_only: bool = False,
    patience: float = _PATIENCE,
) -> None:
    """`DirectoryError` on all ranks unless all write into the same ``directory``; every rank must call it.

    The first rank makes the folder where it is missing.  ``what`` is the setting that names it, ``patience`` is in
    seconds.  A folder that ``may_be_read_only`` and is, passes: nobody waits for what is never written there.
    Nothing stays behind.
    """
    drawn = agreement.first(f".seen-{secrets.token_hex(16)}" if agreement.rank == 0 else None)
    assert drawn is not None
    token, own = directory / drawn.text, directory / f"{drawn.text}-{agreement.rank}"
    try:
        refusal = _write(token) if agreement.rank == 0 else None
        if may_be_read_only and agreement.maximum([refusal is not None and refusal.errno in _READ_ONLY])[0]:
            return
        complaint = (
            _complaint(agreement, _reason(refusal), "cannot write into it", "make it one that all can write")
            or _complaint(
                agreement,
                None if _is_seen(token, patience) else "",
                "does not see what the first rank writes there",
                "choose a folder on a file system that all nodes share",
            )
            or _complaint(
                agreement,
                _reason(_write(own)),
                "cannot write into it",
                "give it the same permissions on all nodes",
            )
        )
    finally:
        _remove(own)
        if agreement.rank == 0:
            _remove(token)
    if complaint is not None:
        raise DirectoryError(f"{what} ({directory}): {complaint}")


def _complaint(agreement: Agreement, reason: str | None, fault: str, way_out: str) -> str | None:
    """Which hosts have a ``reason`` to complain, alike on all ranks; None where none has."""
    own = None if reason is None else f"{socket.gethostname()}\n{reason}"
    told = {rank: text.partition("\n") for rank, text in enumerate(agreement.texts(own)) if text is not None}
    if not told:
        return None
    reasons = sorted({why for _, _, why in told.values() if why})
    because = f" ({'; '.join(reasons)})" if reasons else ""
    return f"{_hosts((rank, host) for rank, (host, _, _) in told.items())} {fault}{because}; {way_out}"


def _hosts(places: Iterable[tuple[int, str]]) -> str:
    """``node1 (rank 2, 3), node2 (rank 4, 5)``."""
    ranks: dict[str, list[str]] = {}
    for rank, host in places:
        ranks.setdefault(host, []).append(str(rank))
    return ", ".join(f"{host} (rank {', '.join(numbers)})" for host, numbers in ranks.items())


def _write(token: Path) -> OSError | None:
    """What stands against writing ``token``, whose content is its own name."""
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        with token.open("x", encoding="utf-8") as file:
            file.write(token.name)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def _reason(refusal: OSError | None) -> str | None:
    return None if refusal is None else refusal.strerror or str(refusal)


def _is_seen(token: Path, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        # Listing the folder makes a client of a network file system ask its server anew.
        with suppress(OSError):
            os.listdir(token.parent)
        with suppress(OSError, ValueError):
            if token.read_text(encoding="utf-8") == token.name:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
