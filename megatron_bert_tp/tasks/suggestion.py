"""The name that was probably meant."""

from collections.abc import Sequence
from difflib import get_close_matches

_MOST_LISTED = 20


def suggestion(given: str, known: Sequence[str]) -> str:
    """Way out for a name that is not among ``known``: the nearest of them, and which there are."""
    near = get_close_matches(given, known, n=1) or [name for name in known if name.lower() == given.lower()]
    there = ", ".join(map(repr, known[:_MOST_LISTED])) + ", ..." * (len(known) > _MOST_LISTED)
    listed = f"there are {there}" if known else "there are none"
    return f"did you mean {near[0]!r}? {listed}" if near else listed
