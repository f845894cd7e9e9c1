"""Examples out of tables whose columns the settings name."""

from collections.abc import Callable, Iterator

from megatron_bert_tp.config.task_schema import TaskConfig
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks.examples import ChoiceExample, Example, TextExample
from megatron_bert_tp.tasks.reading import cells
from megatron_bert_tp.tasks.reading.parts import Note, Source
from megatron_bert_tp.tasks.reading.row import Row, Wanted
from megatron_bert_tp.tasks.reading.rows import read_rows
from megatron_bert_tp.tasks.task import TASKS, Kind


def read_table(task: TaskConfig, source: Source) -> Iterator[Example | Note]:
    """An example for each row of a table; DataError with file and line where one cannot be made.

    An id is that of `task.columns.id`, else the number of the row from 0.
    """
    make = _MAKERS[TASKS[task.name].kind]
    number = 0
    for row in read_rows(source.path, _wanted(task, is_labelled=source.is_labelled)):
        if isinstance(row, Note):
            yield row
            continue
        column = task.columns.id
        name = f"{source.id_prefix}{number}" if column is None else cells.id_of(row, column)
        yield make(row, name, task, source)
        number += 1


def _wanted(task: TaskConfig, *, is_labelled: bool) -> Wanted:
    columns = task.columns
    needed = [columns.text, columns.pair, columns.id]
    if TASKS[task.name].kind is Kind.CHOICE:
        needed += columns.choices or ()
    names = tuple(name for name in needed if name is not None)
    label = (columns.label,)
    return Wanted(
        needed=names + label if is_labelled else names,
        optional=() if is_labelled else label,
        way_out="name the columns of the file in task.columns",
    )


def _text_example(row: Row, name: str, task: TaskConfig, source: Source) -> Example:
    label = _LABELS[TASKS[task.name].kind](row, task, source.is_labelled)
    pair = task.columns.pair
    return TextExample(
        id=name,
        place=row.place,
        group=source.group,
        text=cells.text_of(row, task.columns.text),
        pair=None if pair is None else cells.text_of(row, pair),
        label=label,
    )


def _choice_example(row: Row, name: str, task: TaskConfig, source: Source) -> Example:
    columns = task.columns
    text, choices = cells.text_of(row, columns.text), _choices(row, task)
    beginning = "" if columns.pair is None else f"{cells.text_of(row, columns.pair)} "
    return ChoiceExample(
        id=name,
        place=row.place,
        group=source.group,
        pairs=tuple((text, f"{beginning}{choice}") for choice in choices),
        label=cells.choice_of(row, columns.label, len(choices), is_labelled=source.is_labelled),
    )


def _choices(row: Row, task: TaskConfig) -> tuple[str, ...]:
    names = task.columns.choices
    if not names:
        raise DataError(f"{row.place}: task.columns.choices is not set; name the columns of the choices")
    texts = cells.texts_of(row, names[0]) if len(names) == 1 else [cells.text_of(row, name) for name in names]
    if len(texts) < 2:
        raise DataError(f"{row.place}: there must be two choices or more, not {len(texts)}; mend the file")
    return tuple(texts)


def _class(row: Row, task: TaskConfig, is_labelled: bool) -> str | None:
    return cells.label_of(row, task.columns.label, is_labelled=is_labelled)


def _classes(row: Row, task: TaskConfig, is_labelled: bool) -> tuple[str, ...] | None:
    return cells.labels_of_row(row, task.columns.label, task.separator, is_labelled=is_labelled)


def _number(row: Row, task: TaskConfig, is_labelled: bool) -> float | None:
    return cells.number_of(row, task.columns.label, is_labelled=is_labelled)


_LABELS: dict[Kind, Callable[[Row, TaskConfig, bool], str | tuple[str, ...] | float | None]] = {
    Kind.CLASS: _class,
    Kind.CLASSES: _classes,
    Kind.NUMBER: _number,
}
_MAKERS: dict[Kind, Callable[[Row, str, TaskConfig, Source], Example]] = {
    **dict.fromkeys(_LABELS, _text_example),
    Kind.CHOICE: _choice_example,
}
