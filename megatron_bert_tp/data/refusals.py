"""What the operating system refuses, as an error that names the path and the way out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_bert_tp.errors import DataError


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Context manager that turns an OSError into a DataError about the input ``path``."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); check the path and its permissions") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context manager that turns an OSError into a DataError about the output ``path``."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error}); choose another --output, or free some space"
        ) from error
