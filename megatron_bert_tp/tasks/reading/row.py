"""A row of a table, and the columns that a task reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks.suggestion import suggestion


@dataclass(frozen=True, slots=True)
class Row:
    """Values by the name of their column, and where they stand: texts, or whatever the file holds beside texts."""

    place: str
    values: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Names of the columns that must be there, and of those that are read where they are.

    ``way_out``: what to do where one is missing.
    """

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    way_out: str = "check that this is the right file"

    def check(self, there: Sequence[str], place: str) -> None:
        """DataError for the first of the needed columns that is not there, or is there twice."""
        for name in self.needed:
            if name not in there:
                mark = _parted_by(there, name)
                way_out = f"part the cells as the format wants, not by {mark!r}" if mark else self.way_out
                raise DataError(f"{place}: the column {name!r} is missing; {suggestion(name, there)}; {way_out}")
        for name in (*self.needed, *self.optional):
            if there.count(name) > 1:
                raise DataError(f"{place}: the column {name!r} is there twice; rename one of them")


def _parted_by(there: Sequence[str], name: str) -> str | None:
    """The character that parts the columns of a table which was read as one, ``name`` among them."""
    only = there[0] if len(there) == 1 else ""
    return next((mark for mark in ";\t,|" if mark in only and name in only.split(mark)), None)
