"""Rules over the settings of `task`: what fits the task, and no setting that would be ignored."""

from collections.abc import Sequence

from megatron_bert_tp.config.problems import listed
from megatron_bert_tp.config.rule import Broken, Rule
from megatron_bert_tp.config.settings import all_settings
from megatron_bert_tp.config.task_schema import TaskRun
from megatron_bert_tp.config.task_table import TASKS, Kind

TABLES = ("classification", "multi-label", "regression", "multiple-choice")
"""Tasks whose files are tables with columns of any name."""
_CHOICES, _SQUAD, _TAGS = ("multiple-choice",), ("squad",), ("token-classification",)
_READ_FOR_NAMES: dict[str, tuple[str, ...]] = {
    "task.columns.text": TABLES,
    "task.columns.pair": TABLES,
    "task.columns.label": TABLES,
    "task.columns.id": TABLES,
    "task.columns.choices": _CHOICES,
    "task.separator": ("multi-label",),
    "task.scheme": _TAGS,
    "task.unit": _TAGS,
    "task.overlap": _SQUAD,
    "task.longest_answer": _SQUAD,
    "task.n_best": _SQUAD,
    "task.unanswerable": _SQUAD,
    "task.bad_answers": _SQUAD,
}
_READ_FOR_KINDS: dict[str, tuple[Kind, ...]] = {
    "task.labels": (Kind.CLASS, Kind.CLASSES, Kind.TAGS),
    "task.label_smoothing": (Kind.CLASS, Kind.TAGS, Kind.CHOICE),
    "task.class_weights": (Kind.CLASS, Kind.TAGS),
    "task.balanced": (Kind.CLASS, Kind.TAGS),
}
_SPECIAL_TOKENS = 3  # [CLS] question [SEP] context [SEP]


def is_read(path: str, name: str) -> bool:
    """Whether the task ``name`` reads the setting ``path``."""
    names, kinds = _READ_FOR_NAMES.get(path), _READ_FOR_KINDS.get(path)
    return (names is None or name in names) and (kinds is None or TASKS[name].kind in kinds)


def _names_fit(path: str) -> Rule:
    """The rule that a setting of some tasks is not given for another."""
    readers = _READ_FOR_NAMES[path]

    def check(value: object, name: str) -> Broken | None:
        if is_read(path, name) or value == all_settings(TaskRun)[path].default:
            return None
        return Broken(f"is read for {listed(readers, 'and')} alone, and task.name is {name}", f"leave {path} out")

    return Rule((path, "task.name"), check)


def _kinds_fit(path: str) -> Rule:
    """The rule that a setting of some kinds of tasks is not given for another kind."""
    readers = _READ_FOR_KINDS[path]

    def check(value: object, name: str) -> Broken | None:
        if is_read(path, name) or value == all_settings(TaskRun)[path].default:
            return None
        learned, kind = listed([reader.value for reader in readers]), TASKS[name].kind.value
        return Broken(f"is read where {learned} is learned, and {name} learns {kind}", f"leave {path} out")

    return Rule((path, "task.name"), check)


def _labels_differ(labels: tuple[str, ...] | None, name: str) -> Broken | None:
    if labels is None:
        return None
    twice = _twice(labels)
    if twice:
        return Broken("must name each label once", f"name {listed(twice, 'and')} once")
    if len(labels) == 1 and TASKS[name].kind is not Kind.CLASSES:
        return Broken("must hold two labels at least: one alone is nothing to choose from", "name all labels")
    return None


def _labels_are_the_tasks(labels: tuple[str, ...] | None, name: str) -> Broken | None:
    own = TASKS[name].labels
    if labels is None or own is None or sorted(labels) == sorted(own):
        return None
    return Broken(
        f"must hold the labels of {name}, in any order: {listed(own, 'and')}",
        f"leave task.labels out, or write [{', '.join(own)}] in the order of your numbers",
    )


def _labels_are_tags(labels: tuple[str, ...] | None, name: str) -> Broken | None:
    if labels is None or TASKS[name].kind is not Kind.TAGS:
        return None
    strange = [label for label in labels if label != "O" and (label[:2] not in ("B-", "I-") or not label[2:])]
    if not strange and "O" in labels:
        return None
    return Broken(
        f"must be O and tags such as B-person and I-person{f', not {listed(strange)}' if strange else ''}",
        "write them in IOB2, for example [O, B-person, I-person]; files may mark entities in other ways",
    )


def _weights_fit_labels(
    weights: tuple[float, ...] | None, labels: tuple[str, ...] | None, name: str
) -> Broken | None:
    known = labels or TASKS[name].labels
    if weights is None or known is None or len(weights) == len(known):
        return None
    return Broken(
        f"must hold a weight for each of the {len(known)} labels: {listed(known, 'and')}",
        f"use, for example, {[1.0] * len(known)}, or leave task.class_weights out",
    )


def _weights_are_said_once(weights: tuple[float, ...] | None, is_balanced: bool) -> Broken | None:
    if weights is None or not is_balanced:
        return None
    return Broken("and task.balanced exclude each other: both say the weights of classes", "keep one of the two")


def _choices_are_named(choices: tuple[str, ...] | None, name: str) -> Broken | None:
    if choices is not None or name not in _CHOICES:
        return None
    return Broken(
        f"is required where task.name is {name}",
        "name the columns of the choices, for example [ending0, ending1], or the one that holds a list",
    )


def _columns_differ(
    text: str, pair: str | None, label: str, choices: tuple[str, ...] | None, name: str
) -> Broken | None:
    twice = _twice([column for column in (text, pair, label, *(choices or ())) if column is not None])
    if not twice or name not in TABLES:
        return None
    return Broken(
        f"and the other columns must differ: {listed(twice, 'and')} is named twice",
        "name a column for each of task.columns.text, pair, label and choices",
    )


def _windows_move(overlap: int, name: str, sequence: int) -> Broken | None:
    room = sequence - _SPECIAL_TOKENS
    if name not in _SQUAD or overlap < room:
        return None
    return Broken(
        f"must be below {room} = data.sequence_length ({sequence}) - {_SPECIAL_TOKENS} special tokens: windows "
        "that share all they hold never move on",
        f"raise data.sequence_length, for example to 384, or use at most {room // 2}",
    )


def _twice(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


TASK_KIND_RULES: tuple[Rule, ...] = (
    *map(_names_fit, _READ_FOR_NAMES),
    *map(_kinds_fit, _READ_FOR_KINDS),
    Rule(("task.labels", "task.name"), _labels_differ),
    Rule(("task.labels", "task.name"), _labels_are_the_tasks),
    Rule(("task.labels", "task.name"), _labels_are_tags),
    Rule(("task.class_weights", "task.labels", "task.name"), _weights_fit_labels),
    Rule(("task.class_weights", "task.balanced"), _weights_are_said_once),
    Rule(("task.columns.choices", "task.name"), _choices_are_named),
    Rule(
        ("task.columns.text", "task.columns.pair", "task.columns.label", "task.columns.choices", "task.name"),
        _columns_differ,
    ),
    Rule(("task.overlap", "task.name", "data.sequence_length"), _windows_move),
)
