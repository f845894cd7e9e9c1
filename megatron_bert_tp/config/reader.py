"""Strict YAML: the settings file as entries that remember their line, without YAML's traps.

Plain scalars follow YAML 1.2: ``1e-4`` is a number, ``yes``, ``on``, ``010`` and ``1:30`` are text.
Anchors, aliases, tags and several documents in one file are refused; repeated keys are all kept, so
that the caller can report them.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from megatron_bert_tp.errors import ConfigError

if TYPE_CHECKING:
    from yaml._yaml import Mark as CMark
    from yaml.error import Mark

LARGEST_FILE = 1_000_000
_DEEPEST = 12
_MOST_EVENTS = 4_000

_WORDS: dict[str, object] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}
# Leading zeros make a number text: YAML 1.1 would read 010 as 8, YAML 1.2 as 10.
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,29})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Entry:
    """One key of a mapping: a scalar, a list, or a `Mapping` as its value, and where it stands."""

    name: str
    value: object
    place: str


@dataclass(frozen=True)
class Mapping:
    """Entries of a YAML mapping in the order of the file, repeated keys included."""

    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        return f"{{{', '.join(f'{entry.name}: ...' for entry in self.entries)}}}"


def read_file(path: Path) -> Mapping:
    """Entries of a YAML file; `ConfigError` where it is missing, too large or not strict YAML."""
    return _read_mapping(_read_text(path), str(path))


def read_value(text: str, source: str) -> object:
    """Value of an override: a list, mapping or quoted text in YAML's flow style, else one scalar."""
    text = text.strip()
    if text.startswith(("[", "{", '"', "'")):
        node = _compose(text, source)
        return None if node is None else _value_of(node, source)
    return plain_scalar(text)


def plain_scalar(text: str) -> object:
    """Value of an unquoted scalar by the rules of YAML 1.2."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def _read_text(path: Path) -> str:
    try:
        content = _read_bytes(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    if len(content) > LARGEST_FILE:
        raise ConfigError(
            f"{path} is larger than {LARGEST_FILE:,} bytes, so it is no settings file; name a YAML file"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line} is not UTF-8 text; save the file as UTF-8") from error


def _read_bytes(path: Path) -> bytes:
    if not path.exists():
        raise ConfigError(f"there is no settings file {path}; {_nearby(path.parent)}")
    # Before opening: a named pipe would wait for a writer for ever.
    if not path.is_file():
        raise ConfigError(f"{path} is not a file; {_nearby(path)}")
    with path.open("rb") as file:
        return file.read(LARGEST_FILE + 1)


def _nearby(folder: Path) -> str:
    found = sorted({file for place in (folder, Path("configs")) for file in _yaml_files(place)})
    if not found:
        return "name a YAML file, for example configs/demo.yaml"
    return f"near it: {', '.join(map(str, found[:10]))}"


def _yaml_files(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (file for pattern in ("*.yaml", "*.yml") for file in folder.glob(pattern))


def _read_mapping(text: str, source: str) -> Mapping:
    node = _compose(text, source)
    if node is None:
        raise ConfigError(f"{source} is empty; start from a copy of configs/demo.yaml")
    value = _value_of(node, source)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{source} must hold sections such as `model:` at its top level, not {value!r:.60}")
    return value


def _compose(text: str, source: str) -> yaml.Node | None:
    try:
        _refuse_traps(text, source)
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        what = "; ".join(part for part in (error.context, error.problem) if part)
        raise _syntax_error(what, error.problem_mark or error.context_mark, source) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{source}:{line} holds the unprintable character {error.character!r}; remove it"
        ) from error


def _refuse_traps(text: str, source: str) -> None:
    """Refuse what could expand, recurse or construct, while the text is still a stream of events."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST or number > _MOST_EVENTS:
            what = f"more than {_DEEPEST} levels or {_MOST_EVENTS} parts: this is no settings file"
            raise _syntax_error(what, event.start_mark, source)
        if getattr(event, "anchor", None):
            what = "anchors (&) and aliases (*) are not allowed: write the value out, or quote the text"
            raise _syntax_error(what, event.start_mark, source)
        if getattr(event, "tag", None):
            what = "tags (!) are not allowed: write the plain value, or quote the text"
            raise _syntax_error(what, event.start_mark, source)


def _syntax_error(what: str, mark: "Mark | CMark | None", source: str) -> ConfigError:
    place = f"{source}:{mark.line + 1}, column {mark.column + 1}" if mark else source
    return ConfigError(
        f"{place}: {what}\n  -> a setting reads `name: value`, indented with spaces under its section"
    )


def _value_of(node: yaml.Node, source: str) -> object:
    if isinstance(node, yaml.ScalarNode):
        return plain_scalar(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_value_of(item, source) for item in node.value]
    assert isinstance(node, yaml.MappingNode)
    return Mapping(tuple(_entry(key, value, source) for key, value in node.value))


def _entry(key: yaml.Node, value: yaml.Node, source: str) -> Entry:
    place = f"{source}:{key.start_mark.line + 1}"
    if not isinstance(key, yaml.ScalarNode):
        raise ConfigError(f"{place}: the name of a setting must be a word, not a list or mapping")
    return Entry(key.value, _value_of(value, source), place)
