"""What is wrong with the settings, and how it is told: all problems in one message."""

from collections.abc import Sequence
from dataclasses import dataclass

_LONGEST_VALUE = 60
_LONGEST_PATH = 100


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong: which setting, which rule it breaks, and the way out."""

    path: str
    rule: str
    way_out: str
    value: str | None = None
    place: str | None = None

    def __str__(self) -> str:
        path = cut(self.path, _LONGEST_PATH)
        head = path if self.value is None else f"{path} = {self.value}"
        place = f"  ({self.place})" if self.place else ""
        return f"  {head}{place}\n      {self.rule}\n      -> {self.way_out}"


def report(problems: Sequence[Problem], source: str) -> str:
    """Message that lists all problems of the settings read from ``source``."""
    return "\n".join([f"{counted(len(problems), 'problem')} in the settings of {source}:", *map(str, problems)])


def shown(value: object) -> str:
    """Value as a YAML file would have it, cut short where it is long."""
    return cut(_as_yaml(value), _LONGEST_VALUE)


def cut(text: str, length: int) -> str:
    """Text of at most ``length`` characters, with dots where something was left out."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def listed(names: Sequence[object], last: str = "or") -> str:
    """Words ``a, b or c``."""
    words = [str(name) for name in names]
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def counted(number: int, one: str, several: str | None = None) -> str:
    """Words ``1 problem`` or ``1,200 problems``; ``several`` where it is not ``one`` and an s."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def _as_yaml(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(_as_yaml(item) for item in value)}]"
    return repr(value) if isinstance(value, str | float) else str(value)
