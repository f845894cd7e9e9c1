"""Rows of tables: CSV, TSV, JSON lines, and folders of the `datasets` library."""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_bert_tp.config.problems import counted
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks.reading.datasets_folder import folder_rows
from megatron_bert_tp.tasks.reading.json_values import parse_json, shown
from megatron_bert_tp.tasks.reading.lines import LONGEST_LINE, read_lines
from megatron_bert_tp.tasks.reading.parts import Note
from megatron_bert_tp.tasks.reading.row import Row, Wanted

LEAST_SHARE = 1000
"""A file may have fewer than one damaged row in so many; they are passed over and noted."""

_JSON_LINES = "each line must be one JSON object"


def read_rows(path: Path, wanted: Wanted) -> Iterator[Row | Note]:
    """Rows of a table, by the end of its name; DataError with file and line for what is wrong."""
    if path.is_dir():
        yield from folder_rows(path, wanted)
        return
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: the name of a table must end in {', '.join(_READERS)}; rename it, or name a folder of "
            "datasets.save_to_disk"
        )
    yield from reader(path, wanted)


def tsv_rows(
    path: Path, wanted: Wanted, *, header: Sequence[str] | None = None, may_be_damaged: bool = False
) -> Iterator[Row | Note]:
    """Rows whose columns are parted by tabs; a quote is a character like any other.

    ``header``: names of the columns of a file that does not begin with them.  ``may_be_damaged``: fewer than one
    row in `LEAST_SHARE` may have too few columns.
    """
    names, num_rows, num_blank, damaged = _checked_header(header, wanted, f"{path}:1"), 0, 0, list[str]()
    for number, text in read_lines(path):
        place, cells = f"{path}:{number}", text.split("\t")
        if not text:
            num_blank += 1
        elif names is None:
            names = _checked_header(cells, wanted, place)
        elif may_be_damaged and len(cells) < len(names):
            damaged.append(place)
        else:
            num_rows += 1
            yield Row(place, _by_name(names, cells, place))
    if damaged:
        yield passed_over(damaged, num_rows + len(damaged), path, "with too few columns", becomes="passed over")
    if num_blank:
        yield Note(f"{path}: {counted(num_blank, 'blank line')} passed over")


def noted(damaged: Sequence[str], num_rows: int, path: Path, what: str) -> str:
    """Which rows of a file with so many rows are damaged."""
    return f"{path}: {len(damaged)} of {num_rows} rows {what}, the first at {damaged[0]}"


def passed_over(damaged: Sequence[str], num_rows: int, path: Path, what: str, *, becomes: str) -> Note:
    """Note about damaged rows and what becomes of them; DataError when there are too many."""
    if len(damaged) * LEAST_SHARE >= num_rows:
        raise DataError(
            f"{noted(damaged, num_rows, path, what)}; fewer than 1 in {LEAST_SHARE} is taken as known damage of a "
            "file, this is more: mend the rows or fetch the file again"
        )
    return Note(noted(damaged, num_rows, path, f"{what} {becomes}"))


def _csv_rows(path: Path, wanted: Wanted) -> Iterator[Row | Note]:
    lines = (f"{text}\n" for _, text in read_lines(path))
    reader = csv.reader(lines, strict=True)
    names: list[str] | None = None
    num_blank = 0
    while (cells := _next_record(reader, place := f"{path}:{reader.line_num + 1}")) is not None:
        if not cells:
            num_blank += 1
        elif names is None:
            names = _checked_header(cells, wanted, place)
        else:
            yield Row(place, _by_name(names, cells, place))
    if num_blank:
        yield Note(f"{path}: {counted(num_blank, 'blank line')} passed over")


def _next_record(reader: Iterator[list[str]], place: str) -> list[str] | None:
    # The limit is one of the whole process, and by default shorter than many a text; others keep theirs.
    limit = csv.field_size_limit(LONGEST_LINE)
    try:
        return next(reader, None)
    except csv.Error as error:
        raise DataError(
            f"{place}: the row that begins here is no CSV ({error}); close its quotes, write a quote within a "
            "text twice, or use JSON lines"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _json_rows(path: Path, wanted: Wanted) -> Iterator[Row | Note]:
    num_blank = 0
    for number, text in read_lines(path):
        if not text.strip():
            num_blank += 1
            continue
        if number == num_blank + 1 and text.lstrip().startswith("["):
            raise DataError(f"{path}:{number}: this is a JSON array; write one object a line, without brackets")
        values = parse_json(text, path, number, way_out=_JSON_LINES)
        if not isinstance(values, dict):
            raise DataError(f"{path}:{number}: {_JSON_LINES}, but it is {shown(values)}")
        wanted.check(list(values), f"{path}:{number}")
        yield Row(f"{path}:{number}", values)
    if num_blank:
        yield Note(f"{path}: {counted(num_blank, 'blank line')} passed over")


_READERS: dict[str, Callable[[Path, Wanted], Iterator[Row | Note]]] = {
    ".csv": _csv_rows,
    ".tsv": tsv_rows,
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".ndjson": _json_rows,
}


def _checked_header(cells: Sequence[str] | None, wanted: Wanted, place: str) -> list[str] | None:
    if cells is None:
        return None
    names = [cell.strip() for cell in cells]
    wanted.check(names, place)
    return names


def _by_name(names: Sequence[str], cells: Sequence[str], place: str) -> dict[str, object]:
    if len(cells) != len(names):
        raise DataError(
            f"{place}: the row has {counted(len(cells), 'column')}, but there must be {len(names)} "
            f"({', '.join(names)}); mend the row"
        )
    return dict(zip(names, cells, strict=True))
