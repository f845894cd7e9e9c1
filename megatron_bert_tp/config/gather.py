"""From entries to values: which setting is given where, and which keys are no settings at all."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from megatron_bert_tp.config.kinds import MismatchError, convert
from megatron_bert_tp.config.problems import Problem, listed, shown
from megatron_bert_tp.config.reader import Entry, Mapping, read_value
from megatron_bert_tp.config.settings import Setting, all_sections, all_settings, joined

COMMAND_LINE = "command line"
# Sections that one schema has and another has not, and what their files are for.
_ELSEWHERE = {
    "task": "settings of a task are for megatron_bert_tp.finetune and megatron_bert_tp.evaluate",
    "objective": "settings of pretraining are for megatron_bert_tp.pretrain",
}


@dataclass
class Gathered:
    """Entries under the path of their setting, sections that occur, and problems found on the way."""

    root: type
    given: dict[str, Entry] = field(default_factory=dict)
    sections: dict[str, Entry] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def add_(self, section: str, entries: Iterable[Entry]) -> None:
        """Sort the entries of a section into settings, nested sections and problems."""
        for entry in entries:
            path = joined(section, entry.name)
            if path in all_sections(self.root):
                self._add_section_(path, entry)
            elif path in all_settings(self.root) and "." not in entry.name:
                self._add_once_(self.given, path, entry)
            else:
                self.problems.append(_unknown(self.root, path, entry))

    def _add_section_(self, path: str, entry: Entry) -> None:
        self._add_once_(self.sections, path, entry)
        if isinstance(entry.value, Mapping):
            self.add_(path, entry.value.entries)
        elif entry.value is not None:
            members = ", ".join(_members(self.root, path))
            self.problems.append(
                Problem(
                    path=path,
                    rule="is a section: it holds settings, not a value",
                    way_out=f"indent its settings under it: {members}",
                    value=shown(entry.value),
                    place=entry.place,
                )
            )

    def _add_once_(self, known: dict[str, Entry], path: str, entry: Entry) -> None:
        first = known.setdefault(path, entry)
        if first is not entry:
            self.problems.append(
                Problem(
                    path=path,
                    rule=f"is given twice, first in {first.place}",
                    way_out="keep one of the two",
                    place=entry.place,
                )
            )


def gather_file(root: type, mapping: Mapping) -> Gathered:
    """What a file gives of the settings of the schema ``root``."""
    gathered = Gathered(root)
    gathered.add_("", mapping.entries)
    return gathered


def gather_overrides(root: type, overrides: Sequence[str]) -> Gathered:
    """What ``section.key=value`` arguments give; a section takes a mapping, as in ``run={log_every: 5}``."""
    gathered = Gathered(root)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or path.startswith("-"):
            gathered.problems.append(_no_override(root, override))
            continue
        section, _, name = path.strip().rpartition(".")
        gathered.add_(section, [Entry(name, read_value(text, f"{COMMAND_LINE}, {path}"), COMMAND_LINE)])
    return gathered


def valid_values(root: type, given: dict[str, Entry]) -> tuple[dict[str, object], list[Problem]]:
    """Values of all settings that are right, defaults included, and the problems of those that are not."""
    values: dict[str, object] = {}
    problems: list[Problem] = []
    for path, setting in all_settings(root).items():
        if path not in given:
            if not setting.is_required:
                values[path] = setting.default
            continue
        try:
            values[path] = _checked(setting, given[path].value)
        except MismatchError as mismatch:
            problems.append(_mismatched(setting, given[path], mismatch))
    return values, problems


def missing(root: type, given: dict[str, Entry]) -> Iterator[Problem]:
    """Required settings that nobody gives: one problem per section without any, else one per setting."""
    for section in all_sections(root):
        required = [row for row in _rows_of(root, section) if row.is_required]
        absent = [row for row in required if row.path not in given]
        if len(absent) > 1 and len(absent) == len(required):
            names = listed([row.path.rpartition(".")[2] for row in absent], "and")
            yield Problem(path=section, rule=f"requires {names}", way_out=f"add them under `{section}:`")
            continue
        for row in absent:
            yield Problem(path=row.path, rule="is required", way_out=f"add it under `{section}:` ({row.meaning})")


def _checked(setting: Setting, value: object) -> object:
    converted = convert(value, setting.kind)
    if not setting.allows(converted):
        raise MismatchError(f"must be {setting.range()}")
    return converted


def _mismatched(setting: Setting, entry: Entry, mismatch: MismatchError) -> Problem:
    usual = "" if setting.is_required else f" (default: {shown(setting.default)})"
    hint = mismatch.hint or f"choose {setting.meaning}{usual}"
    return Problem(
        path=setting.path, rule=mismatch.rule, way_out=hint, value=shown(entry.value), place=entry.place
    )


def _no_override(root: type, argument: str) -> Problem:
    path = argument.lstrip("-").partition("=")[0]
    meant = path if path in all_settings(root) else "section.key"
    return Problem(
        path=argument,
        rule="is no setting: an argument reads section.key=value",
        way_out=f"write {meant}=VALUE; --help lists all settings",
        place=COMMAND_LINE,
    )


def _unknown(root: type, path: str, entry: Entry) -> Problem:
    return Problem(path=path, rule="is no setting", way_out=_suggestion(root, path), place=entry.place)


def _suggestion(root: type, path: str) -> str:
    known = [*all_settings(root), *all_sections(root)]
    section, _, name = path.rpartition(".")
    if path in known:
        return f"write `{name}:` indented under `{section}:`"
    if path in _ELSEWHERE:
        return _ELSEWHERE[path]
    meant = _similar(path, known) or _same_words(name, known)
    if meant:
        return f"did you mean {listed(meant)}?"
    members = _members(root, section)
    return f"{section or 'the top level'} holds {', '.join(members)}; --help lists all settings"


def _similar(path: str, known: Sequence[str]) -> list[str]:
    """Known paths that look like ``path`` as a whole, or else those whose last name does."""
    names = {other.rpartition(".")[2]: other for other in known}
    close = difflib.get_close_matches(path.rpartition(".")[2], names, n=2, cutoff=0.7)
    return difflib.get_close_matches(path, known, n=1, cutoff=0.85) or [names[name] for name in close]


def _same_words(name: str, known: Sequence[str]) -> list[str]:
    """Known paths whose last name holds all words of ``name``, as ``num_hidden_layers`` holds ``layers``."""
    words = set(name.lower().split("_"))
    return [path for path in known if words <= set(path.rpartition(".")[2].split("_"))][:3]


def _members(root: type, section: str) -> list[str]:
    """Names directly inside a section, or the top-level sections for an unknown one."""
    paths = [*all_settings(root), *all_sections(root)]
    inside = [path for path in paths if path.rpartition(".")[0] == section]
    top = [path for path in all_sections(root) if "." not in path]
    return [path.rpartition(".")[2] for path in inside] or top


def _rows_of(root: type, section: str) -> list[Setting]:
    return [row for path, row in all_settings(root).items() if path.rpartition(".")[0] == section]
