"""Durations as people write them in settings: ``3h50m``, ``45m``, ``90s``, ``1d12h``."""

import re

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?:(\d{1,6})d)?(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?", re.ASCII)


def seconds_of(text: str) -> int | None:
    """Seconds of a duration above 0; None where ``text`` is none."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        return None
    amounts = [int(amount or 0) for amount in found.groups()]
    return sum(n * unit for n, unit in zip(amounts, _UNITS.values(), strict=True)) or None
