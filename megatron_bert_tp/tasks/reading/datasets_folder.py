"""Rows of a folder that `datasets.save_to_disk` wrote, with that library where it is installed."""

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks.reading.json_values import parse_json
from megatron_bert_tp.tasks.reading.lines import read_whole
from megatron_bert_tp.tasks.reading.row import Row, Wanted

_ROWS = 1000  # of a batch
_STATE = "state.json"
_SPLITS = "dataset_dict.json"


def folder_rows(path: Path, wanted: Wanted) -> Iterator[Row]:
    """Rows with the wanted columns, classes by their names; a place is the number of the row, from 0.

    A class number below 0, which stands for none in such folders, becomes None.
    """
    _check_folder(path)
    if _is_empty(path):  # the library has no words for it
        return
    data = _loaded(path, _library(path))
    wanted.check(data.column_names, str(path))
    kept = [name for name in data.column_names if name in wanted.needed + wanted.optional]
    named = {name: _naming(data.features[name]) for name in kept}
    number = 0
    for batch in data.select_columns(kept).with_format(None).iter(_ROWS):
        for values in zip(*(batch[name] for name in kept), strict=True):
            named_values = {name: named[name](value) for name, value in zip(kept, values, strict=True)}
            yield Row(f"{path}, row {number}", named_values)
            number += 1


def _check_folder(path: Path) -> None:
    if (path / _SPLITS).is_file():
        parts = sorted(str(file.parent) for file in path.glob(f"*/{_STATE}"))
        raise DataError(f"{path}: holds several parts; name one of them: {', '.join(parts)}")
    if not (path / _STATE).is_file():
        raise DataError(f"{path}: is a folder without {_STATE}, so not one of datasets.save_to_disk; name a file")


def _is_empty(path: Path) -> bool:
    state = parse_json(read_whole(path / _STATE), path / _STATE)
    return isinstance(state, dict) and state.get("_data_files") == []


def _library(path: Path) -> ModuleType:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"{path}: reading this folder needs the datasets library; install it with "
            "`pip install 'megatron-bert-tp[datasets]'`"
        ) from error


def _loaded(path: Path, library: ModuleType) -> Any:
    try:
        return library.load_from_disk(str(path))
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{path}: datasets.load_from_disk cannot read this folder ({reason})") from error


def _naming(feature: Any) -> Callable[[object], object]:
    """Function from a stored value to one with names in place of the numbers of classes."""
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
    if inner is not None and not isinstance(inner, dict):
        of_item = _naming(inner)
        return lambda values: [of_item(value) for value in values] if isinstance(values, list) else values
    names = getattr(feature, "names", None)
    if names is None:
        return lambda value: value
    return lambda value: names[value] if isinstance(value, int) and value >= 0 else None
