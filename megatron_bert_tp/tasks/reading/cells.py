"""Values of a row as texts, numbers and labels, with its place where one of them will not do."""

import math
from collections.abc import Sequence

from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks.reading.json_values import shown
from megatron_bert_tp.tasks.reading.row import Row

_SEPARATORS = {"space": " ", "tab": "\t"}
"""Values of `task.separator` that stand for what a setting cannot be."""


def text_of(row: Row, column: str, *, may_be_empty: bool = False) -> str:
    """Text as it stands in the file, white space at its ends included."""
    text = row.values[column]
    if not isinstance(text, str):
        raise DataError(f"{row.place}: {column!r} must be a text, but it is {shown(text)}; mend the file")
    if not (may_be_empty or text.strip()):
        raise DataError(f"{row.place}: {column!r} is empty; give a text, or leave the row out")
    return text


def id_of(row: Row, column: str) -> str:
    """Name of an example: a text or a whole number."""
    value = row.values[column]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_of(row, column).strip()


def label_of(row: Row, column: str, *, is_labelled: bool) -> str | None:
    """Name of a class: a text without the white space around it, or a number of JSON."""
    value = row.values.get(column)
    if not _is_missing(value):
        return _name(value, row, column)
    _without_label(row, column, is_labelled=is_labelled)
    return None


def labels_of_row(row: Row, column: str, separator: str, *, is_labelled: bool) -> tuple[str, ...] | None:
    """Names of all classes that hold: a list of JSON, or a text cut at ``separator``.

    None at all may hold: an empty list, or, where labels must be there, an empty text.  Elsewhere an empty text is
    no label, as in a test file that has the column but not what it says.
    """
    value = row.values.get(column)
    if value is None or (not is_labelled and _is_missing(value)):
        _without_label(row, column, is_labelled=is_labelled)
        return None
    if isinstance(value, str):
        value = value.split(_SEPARATORS.get(separator, separator)) if value.strip() else []
    if not isinstance(value, list):
        raise DataError(f"{row.place}: {column!r} must be a list or a text, not {shown(value)}; mend the file")
    names = [_name(item, row, column) for item in value]
    if "" in names:
        raise DataError(
            f"{row.place}: one of the labels of {column!r} is empty ({shown(row.values[column])}); "
            "leave it out with its separator, or set task.separator"
        )
    kept = tuple(dict.fromkeys(names))
    if len(kept) < len(names) and set(kept) <= {"0", "1"}:
        raise DataError(
            f"{row.place}: {column!r} looks like a vector of 0 and 1 ({shown(row.values[column])}), which is not "
            "read; give the names of the classes that hold"
        )
    return kept


def number_of(row: Row, column: str, *, is_labelled: bool) -> float | None:
    """A finite number, or a text that is one."""
    value = row.values.get(column)
    if _is_missing(value):
        _without_label(row, column, is_labelled=is_labelled)
        return None
    number = _number(value)
    if number is None or not math.isfinite(number):
        raise DataError(f"{row.place}: {column!r} must be a finite number, not {shown(value)}; mend the file")
    return number


def choice_of(row: Row, column: str, num_choices: int, *, is_labelled: bool) -> int | None:
    """Number of the right choice, from 0; ``1.0`` is 1, as spreadsheets write it."""
    number = number_of(row, column, is_labelled=is_labelled)
    if number is None:
        return None
    if number not in range(num_choices):
        raise DataError(
            f"{row.place}: the label {shown(row.values[column])} of {column!r} is none of the choices, which are "
            f"{', '.join(map(str, range(num_choices)))}; mend the file"
        )
    return int(number)


def texts_of(row: Row, column: str) -> Sequence[str]:
    """List of JSON with texts."""
    value = row.values[column]
    if not isinstance(value, list):
        raise DataError(
            f"{row.place}: {column!r} must be a list of texts, but it is {shown(value)}; give JSON lines, or name "
            "a column for each choice in task.columns.choices"
        )
    for text in value:
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{row.place}: {column!r} holds {shown(text)}, which is no text; mend the file")
    return value


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _without_label(row: Row, column: str, *, is_labelled: bool) -> None:
    if is_labelled:
        raise DataError(f"{row.place}: {column!r} has no label; give one, or leave the row out")


def _name(value: object, row: Row, column: str) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # JSON has one kind of number
    if isinstance(value, int | float):
        return str(value)
    raise DataError(f"{row.place}: {column!r} must be a text or a number, but it is {shown(value)}; mend the file")


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if isinstance(value, str) and "_" in value:
        return None  # Python's own spelling of 1000
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
