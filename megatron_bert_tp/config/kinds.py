"""Kinds of values: what the annotation of a setting accepts, and how it is called in messages."""

import difflib
import math
import re
from collections.abc import Callable
from types import UnionType
from typing import Literal, Union, get_args, get_origin

from megatron_bert_tp.config.problems import listed

_LARGEST_INTEGER = 2**63 - 1
_THOUSANDS = re.compile(r"[-+]?[1-9][0-9]{0,2}(,[0-9]{3})+")
_LEADING_ZEROS = re.compile(r"^([-+]?)0+(?=[0-9])")
_DECIMAL_COMMA = re.compile(r"[-+]?[0-9]+,[0-9]+([eE][-+]?[0-9]+)?")


class MismatchError(Exception):
    """A value that a setting does not accept, with a hint where one is at hand."""

    def __init__(self, rule: str, hint: str | None = None) -> None:
        super().__init__(rule)
        self.rule = rule
        self.hint = hint


def convert(value: object, kind: object) -> object:
    """Value as the annotation ``kind`` has it (an integer becomes a float); raises `MismatchError`."""
    if kind in _SCALARS:
        return _SCALARS[kind](value)
    if is_optional(kind):
        return None if value is None else convert(value, _inner(kind))
    return _COMPOSED[get_origin(kind)](value, get_args(kind))


def name_of(kind: object) -> str:
    """Short name for people, such as ``integer`` or ``gpipe | 1f1b``."""
    if kind in _NAMES:
        return _NAMES[kind]
    if is_optional(kind):
        return f"{name_of(_inner(kind))} | null"
    if get_origin(kind) is tuple:
        first, *others = get_args(kind)
        return f"{_NAMES[first]}, or a list" if others == [...] else f"{1 + len(others)} numbers"
    return " | ".join(map(str, get_args(kind)))


def is_optional(kind: object) -> bool:
    """Whether null is accepted."""
    return get_origin(kind) in (Union, UnionType) and type(None) in get_args(kind)


def _inner(kind: object) -> object:
    (inner,) = (part for part in get_args(kind) if part is not type(None))
    return inner


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    words = {"yes": "true", "on": "true", "no": "false", "off": "false", "1": "true", "0": "false"}
    meant = words.get(str(value).lower())
    raise MismatchError("must be true or false", f"write {meant}" if meant else None)


def _integer(value: object) -> int:
    if isinstance(value, float) and value.is_integer() and abs(value) <= _LARGEST_INTEGER:
        raise MismatchError("must be an integer", f"write {int(value)}")
    if isinstance(value, bool) or not isinstance(value, int):
        raise MismatchError("must be an integer", _integer_hint(value))
    if abs(value) > _LARGEST_INTEGER:
        raise MismatchError("must fit in 63 bits", "choose a smaller number")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MismatchError("must be a number", _number_hint(value))
    if not math.isfinite(value):
        raise MismatchError("must be a finite number", "choose a finite number")
    return float(value)


def _number_hint(value: object) -> str | None:
    """How to write what was meant: ``0,001``, or what `_integer_hint` knows.

    A comma before three digits may part thousands or begin decimals: both ways are told.
    """
    if not isinstance(value, str) or not _DECIMAL_COMMA.fullmatch(value):
        return _integer_hint(value)
    decimal = _LEADING_ZEROS.sub(r"\1", value).replace(",", ".")
    if not _THOUSANDS.fullmatch(value):
        return f"write {decimal}, with a point"
    return f"write {value.replace(',', '')} if the comma parts thousands, or {decimal} if decimals follow it"


def _integer_hint(value: object) -> str | None:
    """How to write what was meant: ``"12"``, ``012``, ``1_000``, ``1,000``, which no decimals can follow."""
    if not isinstance(value, str):
        return None
    parted = value.replace(",", "") if _THOUSANDS.fullmatch(value) else value
    digits = parted.replace("_", "").lstrip("0")
    if digits.isascii() and digits.isdecimal() and len(digits) < 20:
        return f"write {digits}, without quotes, leading zeros or separators"
    return None


def _text(value: object) -> str:
    if isinstance(value, bool | int | float):
        raise MismatchError("must be text", f"put it in quotes: '{value}'")
    if not isinstance(value, str):
        raise MismatchError("must be text")
    if not value.strip():
        raise MismatchError("must not be empty or blank")
    if not value.isprintable():
        raise MismatchError(
            "must be one line of printable characters", "remove line breaks and control characters"
        )
    return value


def _choice(value: object, choices: tuple[object, ...]) -> object:
    if isinstance(value, str) and value in choices:
        return value
    close = difflib.get_close_matches(str(value).lower(), [str(choice) for choice in choices], n=1, cutoff=0.7)
    meant = f"did you mean {close[0]}?" if close else f"choose {listed(choices)}"
    raise MismatchError(f"must be {listed(choices)}", meant)


def _list(value: object, kinds: tuple[object, ...]) -> tuple[object, ...]:
    """A list of any length (one item alone is a list of one), or of as many numbers as there are kinds."""
    if kinds[1:] == (...,):
        items = value if isinstance(value, list) and value else [value]
        return tuple(convert(item, kinds[0]) for item in items)
    if not isinstance(value, list) or len(value) != len(kinds):
        raise MismatchError(f"must be a list of {len(kinds)} numbers", "write it as [96, 4, 0]")
    return tuple(convert(item, kind) for item, kind in zip(value, kinds, strict=True))


_NAMES: dict[object, str] = {bool: "true | false", int: "integer", float: "number", str: "text"}
_SCALARS: dict[object, Callable[[object], object]] = {
    bool: _boolean,
    int: _integer,
    float: _number,
    str: _text,
}
_COMPOSED: dict[object, Callable[[object, tuple[object, ...]], object]] = {Literal: _choice, tuple: _list}
