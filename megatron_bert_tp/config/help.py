"""Text for ``--help``: every setting with its kind, default and meaning, made from a schema."""

import inspect
import textwrap
from collections.abc import Iterator, Sequence

from megatron_bert_tp.config.kinds import name_of
from megatron_bert_tp.config.problems import shown
from megatron_bert_tp.config.settings import Setting, all_sections, all_settings

_WIDTH = 100
_WIDEST = 25  # longest kind that has a column to itself
_CHOICE = "choice"
_GAP = "  "
_SIGNS = {"at_least": ">=", "above": ">", "at_most": "<=", "below": "<"}
_HEAD = """\
Settings, written `section: {name: value}` in the YAML file, or section.name=value after it.
The columns are name, kind, default (or `required`) and meaning.
"""


def settings_help(root: type) -> str:
    """All settings of the schema with this root, grouped by section, in lines of at most 100 columns."""
    return "\n".join([_HEAD, *(_block(root, section) for section in all_sections(root))])


def _block(root: type, section: str) -> str:
    meaning = inspect.getdoc(all_sections(root)[section]) or ""
    rows = [row for path, row in all_settings(root).items() if path.rpartition(".")[0] == section]
    cells = [(row.path.rpartition(".")[2], _kind(row), _default(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"{section}: {meaning.splitlines()[0]}"]
    for row, texts in zip(rows, cells, strict=True):
        lines.extend(_lines(texts, _meaning(row), widths))
    return "".join(f"{line}\n" for line in lines)


def _kind(row: Setting) -> str:
    # Limits near 2**63 say no more than `integer` does.
    limits = [f"{_SIGNS[name]} {limit:g}" for name, limit in row.bounds.items() if limit < 2**62]
    name = name_of(row.kind)
    return f"{name if len(name) <= _WIDEST else _CHOICE} {', '.join(limits)}".rstrip()


def _meaning(row: Setting) -> str:
    """What the setting means, with the choices that are too long for the column of kinds."""
    return f"{row.meaning}: {name_of(row.kind)}" if _kind(row) == _CHOICE else row.meaning


def _default(row: Setting) -> str:
    if row.is_required:
        return "required"
    if isinstance(row.default, tuple):
        return f"[{', '.join(f'{number:g}' for number in row.default)}]"
    if isinstance(row.default, float):
        return f"{row.default:g}"
    return shown(row.default).strip("'")


def _lines(texts: Sequence[str], meaning: str, widths: Sequence[int]) -> Iterator[str]:
    columns = [text.ljust(width) for text, width in zip(texts, widths, strict=True)]
    head = f"{_GAP}{_GAP.join(columns)}{_GAP}"
    first, *others = textwrap.wrap(meaning, _WIDTH - len(head))
    yield head + first
    yield from (" " * len(head) + line for line in others)
