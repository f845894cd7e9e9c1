"""The name that was probably meant."""

from collections.abc import Sequence
from difflib import get_close_matches

_MOST_LISTED = 20
_LONGEST = 60  # characters of a name


def suggestion(given: str, known: Sequence[str]) -> str:
    """Way out for a name that is not among ``known``: the nearest of them, and which there are."""
    near = get_close_matches(given, known, n=1) or [name for name in known if name.lower() == given.lower()]
    there = ", ".join(map(_shown, known[:_MOST_LISTED])) + ", ..." * (len(known) > _MOST_LISTED)
    listed = f"there are {there}" if known else "there are none"
    return f"did you mean {_shown(near[0])}? {listed}" if near else listed


def _shown(name: str) -> str:
    """In quotes, and cut where it is long: what was taken for names may be a whole file."""
    return repr(name if len(name) <= _LONGEST else f"{name[:_LONGEST]}...")
