"""Texts of a column of a Parquet file, batch by batch, with `pyarrow` where it is installed."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_bert_tp.data.refusals import reading
from megatron_bert_tp.errors import DataError

_ROWS = 256  # of a batch


def read_rows(path: Path, column: str, first: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Row number from ``first`` on, number of rows of the file, and the bytes of the text (None: null)."""
    arrow, parquet = _library(path)
    with reading(path):
        try:
            with parquet.ParquetFile(path, pre_buffer=False) as file:
                _check_column(file, column, arrow, path)
                yield from _rows(file, column, first, arrow)
        except arrow.ArrowException as error:
            raise DataError(
                f"{path}: the Parquet data is damaged or cut short ({_first_line(error)}); fetch the file again, "
                "then run the same command again"
            ) from error


def _rows(file: Any, column: str, first: int, arrow: ModuleType) -> Iterator[tuple[int, int, bytes | None]]:
    total = file.metadata.num_rows
    row = 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if row + size <= first:
            row += size
            continue
        for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[column], use_threads=False):
            # As bytes, so that text that is not UTF-8 meets the same rule as in other files.
            for content in batch.column(0).cast(arrow.binary()).to_pylist():
                if row >= first:
                    yield row, total, content
                row += 1


def _check_column(file: Any, column: str, arrow: ModuleType, path: Path) -> None:
    schema = file.schema_arrow
    if schema.names.count(column) != 1:
        raise DataError(f"{path}: has no column {column!r} but {schema.names[:10]}; name it with --field")
    kind = schema.field(column).type
    kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
    types = arrow.types
    text = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    if not any(is_such(kind) for is_such in text):
        raise DataError(f"{path}: the column {column!r} holds {kind}, not text; name another with --field")


def _library(path: Path) -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow; install it with `pip install 'megatron-bert-tp[parquet]'`"
        ) from error
    return pyarrow, pyarrow.parquet


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
