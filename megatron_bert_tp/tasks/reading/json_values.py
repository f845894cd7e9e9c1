"""JSON out of files of tasks, with file and line of what is wrong."""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_bert_tp.errors import DataError

_LONGEST_SHOWN = 60
_WAY_OUT = "mend the file or fetch it again"


def parse_json(text: str, path: Path, first_line: int = 1, *, way_out: str = _WAY_OUT) -> object:
    """The value of a text that begins at this line of a file; DataError with file and line when it is not JSON.

    Keys that are there twice, numbers that are not finite, and halves of surrogate pairs are refused too.
    """
    try:
        value: object = json.loads(text, parse_constant=_refused, object_pairs_hook=_without_duplicates)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{first_line + error.lineno - 1}: not JSON ({error.msg}, column {error.colno}); {way_out}"
        ) from error
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path}:{first_line}: an escape is half of a surrogate pair and no character; write the "
            "character itself"
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}:{first_line}: nested too deeply; check that this is the file") from error
    except (_NotTakenError, ValueError) as error:  # a whole number of thousands of digits is a ValueError
        raise DataError(f"{path}:{first_line}: {error}") from error
    return value


def shown(value: object) -> str:
    """A value as a message shows it, cut where it is long."""
    if value is None:
        return "missing or null"
    text = value if isinstance(value, str) else repr(value)
    cut = text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
    return repr(cut) if isinstance(value, str) else cut


class _NotTakenError(Exception):
    """JSON, or nearly, that this reader does not take."""


def _refused(constant: str) -> object:
    raise _NotTakenError(f"{constant} is no number of JSON; give a finite number, or null where there is none")


def _without_duplicates(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _NotTakenError(f"the key {shown(twice)} is there twice; leave one of them out")
    return values
