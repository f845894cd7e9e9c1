"""Where a conversion writes until all is there: a folder with a name of its own, beside the place it is for."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from megatron_bert_tp.errors import FormatError

_CONTENT = "content"


def check_free(out: Path) -> None:
    """FormatError unless ``out`` does not exist, or is an empty directory."""
    if out.is_symlink():
        raise FormatError(f"{out}: is a symbolic link; give the folder that is meant itself, or another name")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FormatError(f"{out}: exists already and is not empty; remove it, or give another name")


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """New, empty folder on the disk of ``out``, which may be renamed to it; what is left in the end is removed.

    Nothing is removed but what this made: the outer folder has a random name that nothing had before.
    """
    place = out.absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    outer = Path(mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        # The outer folder is closed to others; this one has ordinary permissions, as OUT is to have.
        content = outer / _CONTENT
        content.mkdir()
        yield content
    finally:
        shutil.rmtree(outer, ignore_errors=True)
