"""Sockets of a process on which it waits for others, as Linux lists them."""

import ipaddress
import os
import re
from contextlib import suppress
from pathlib import Path

_LISTEN = "0A"


def listening(process: int) -> set[str]:
    """Addresses of the TCP sockets on which ``process`` listens."""
    own = _socket_inodes(process)
    found: set[str] = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and fields[9] in own:
                found.add(_address(fields[1].partition(":")[0]))
    return found


def listens_beyond_loopback(process: int) -> set[str]:
    """Those of its addresses that another machine may reach."""
    return {text for text in listening(process) if not ipaddress.ip_address(text).is_loopback}


def _socket_inodes(process: int) -> set[str]:
    inodes = set()
    for entry in Path(f"/proc/{process}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile, as the one of this listing
            found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry))
            inodes |= {found[1]} if found else set()
    return inodes


def _address(text: str) -> str:
    """The kernel writes words of 32 bits in the order of the machine."""
    words = [bytes.fromhex(text[place : place + 8])[::-1] for place in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
