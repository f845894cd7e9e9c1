"""The nine tasks of GLUE, from the TSV files as GLUE distributes them.

    task    file says                            number of each class
    cola    0, 1                                 unacceptable 0, acceptable 1
    sst-2   0, 1                                 negative 0, positive 1
    mrpc    0, 1                                 not_equivalent 0, equivalent 1
    qqp     0, 1                                 not_duplicate 0, duplicate 1
    mnli    entailment, neutral, contradiction   0, 1, 2 in this order
    qnli    entailment, not_entailment           0, 1 in this order
    rte     entailment, not_entailment           0, 1 in this order
    wnli    0, 1                                 not_entailment 0, entailment 1
    sts-b   a number from 0 to 5                 -    (-1 in a folder: none)

Examples carry the names.  Columns are found by their names, whatever their order.  A folder of
`datasets.save_to_disk` has the columns of the `glue` data set on Hugging Face's hub.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from megatron_bert_tp.config.problems import counted
from megatron_bert_tp.config.task_schema import TaskConfig
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks.examples import Example, TextExample
from megatron_bert_tp.tasks.reading import cells
from megatron_bert_tp.tasks.reading.datasets_folder import folder_rows
from megatron_bert_tp.tasks.reading.json_values import shown
from megatron_bert_tp.tasks.reading.lines import read_lines
from megatron_bert_tp.tasks.reading.parts import Note, Source
from megatron_bert_tp.tasks.reading.row import Row, Wanted
from megatron_bert_tp.tasks.reading.rows import noted, passed_over, tsv_rows
from megatron_bert_tp.tasks.suggestion import suggestion
from megatron_bert_tp.tasks.task import TASKS


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Names of the columns.

    ``is_numbered``: classes are numbers in the file.  ``headless``: columns of a file that does not name them.
    ``without_label``: what stands for no label.  ``may_be_damaged``: GLUE's own file has broken rows.
    """

    text: str
    pair: str | None = None
    label: str = "label"
    id: str = "index"
    is_numbered: bool = False
    headless: tuple[str, ...] | None = None
    without_label: str | None = None
    may_be_damaged: bool = False


_LAYOUTS = {
    "cola": _Layout(text="sentence", headless=("source", "label", "mark", "sentence"), is_numbered=True),
    "sst-2": _Layout(text="sentence", is_numbered=True),
    "mrpc": _Layout(text="#1 String", pair="#2 String", label="Quality", is_numbered=True),
    "sts-b": _Layout(text="sentence1", pair="sentence2", label="score"),
    "qqp": _Layout(
        text="question1", pair="question2", label="is_duplicate", id="id", is_numbered=True, may_be_damaged=True
    ),
    "mnli": _Layout(text="sentence1", pair="sentence2", label="gold_label", without_label="-"),
    "qnli": _Layout(text="question", pair="sentence"),
    "rte": _Layout(text="sentence1", pair="sentence2"),
    "wnli": _Layout(text="sentence1", pair="sentence2", is_numbered=True),
}
_HUB_TEXTS: dict[str, tuple[str, str | None]] = {
    "cola": ("sentence", None),
    "sst-2": ("sentence", None),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    **dict.fromkeys(("mrpc", "sts-b", "rte", "wnli"), ("sentence1", "sentence2")),
}
_BEST_SCORE, _NO_SCORE = 5, -1
GLUE = tuple(_LAYOUTS)
"""Names of the tasks."""


def read_glue(task: TaskConfig, source: Source) -> Iterator[Example | Note]:
    """An example for each row; DataError with file and line where one cannot be made.

    An id is that of the file where it has one (``index``, QQP ``id``), else the number of the row from 0.  One
    text of a pair may be empty in fewer than one row in a thousand: some of GLUE's rows are so.
    """
    layout = _layout(task.name, source)
    classes = _classes(task.name, layout)
    num_rows, without_label, half_empty = 0, 0, list[str]()
    for row in _rows(source, layout):
        if isinstance(row, Note):
            yield row
            continue
        num_rows += 1
        if source.is_labelled and _has_no_label(row, layout):
            without_label += 1
            continue
        example = _example(row, num_rows - 1, layout, classes, source)
        if not example.text.strip() or (example.pair is not None and not example.pair.strip()):
            half_empty.append(row.place)
        yield example
    if without_label:
        yield Note(
            f"{source.path}: {without_label:,} of {counted(num_rows, 'row')} without a label "
            f"({layout.without_label!r}) passed over"
        )
    if half_empty:
        what = "with one text empty"
        if source.is_labelled:
            yield passed_over(half_empty, num_rows, source.path, what, becomes="kept as they are")
        else:  # each row of a test part is to be predicted
            yield Note(noted(half_empty, num_rows, source.path, f"{what} kept as they are"))


def _layout(name: str, source: Source) -> _Layout:
    if not source.path.is_dir():
        return _LAYOUTS[name]
    text, pair = _HUB_TEXTS[name]
    return _Layout(text=text, pair=pair, id="idx")


def _rows(source: Source, layout: _Layout) -> Iterator[Row | Note]:
    texts = (layout.text,) if layout.pair is None else (layout.text, layout.pair)
    needed = (*texts, layout.label) if source.is_labelled else texts
    wanted = Wanted(needed=needed, optional=(layout.id,) if source.is_labelled else (layout.id, layout.label))
    if source.path.is_dir():
        return folder_rows(source.path, wanted)
    header = None if layout.headless is None or _has_header(source, layout) else layout.headless
    # A row of a test part that is passed over would be missing in what is handed in.
    may_be_damaged = layout.may_be_damaged and source.is_labelled
    return tsv_rows(source.path, wanted, header=header, may_be_damaged=may_be_damaged)


def _has_header(source: Source, layout: _Layout) -> bool:
    """Whether the first line names columns: CoLA's test file does, its other files do not."""
    with closing(read_lines(source.path)) as lines:
        _, first = next(lines, (1, ""))
    return layout.text in first.split("\t")


def _has_no_label(row: Row, layout: _Layout) -> bool:
    return layout.without_label is not None and row.values.get(layout.label) == layout.without_label


def _classes(name: str, layout: _Layout) -> Mapping[str, str] | None:
    """Name of each class by what the file says; None for a task whose label is a number."""
    labels = TASKS[name].labels
    if labels is None:
        return None
    if layout.is_numbered:
        return {str(number): label for number, label in enumerate(labels)}
    return {label: label for label in labels}


def _example(
    row: Row, number: int, layout: _Layout, classes: Mapping[str, str] | None, source: Source
) -> TextExample:
    if classes is None:
        label: str | float | None = _score(row, layout.label, source)
    elif _has_no_label(row, layout):
        label = None
    else:
        label = _label(row, layout.label, classes, is_labelled=source.is_labelled)
    has_id = layout.id in row.values
    text, pair = _texts(row, (layout.text,) if layout.pair is None else (layout.text, layout.pair))
    return TextExample(
        id=f"{source.id_prefix}{cells.id_of(row, layout.id) if has_id else number}",
        place=row.place,
        group=source.group,
        text=text,
        pair=pair,
        label=label,
    )


def _score(row: Row, column: str, source: Source) -> float | None:
    """A score of STS-B, the only task of GLUE whose label is a number; -1 is none in a folder of `datasets`."""
    if source.path.is_dir() and row.values.get(column) == _NO_SCORE:
        row = Row(row.place, {**row.values, column: None})
    score = cells.number_of(row, column, is_labelled=source.is_labelled)
    if score is not None and not 0 <= score <= _BEST_SCORE:
        raise DataError(
            f"{row.place}: the score {shown(row.values[column])} of {column!r} is not from 0 to {_BEST_SCORE}; "
            "mend the row, or read other scores with task.name=regression"
        )
    return score


def _texts(row: Row, columns: Sequence[str]) -> tuple[str, str | None]:
    """The texts as they are; DataError when all of them are empty."""
    is_filled = any(str(row.values[column] or "").strip() for column in columns)
    texts = [cells.text_of(row, column, may_be_empty=is_filled) for column in columns]
    return texts[0], texts[1] if len(texts) > 1 else None


def _label(row: Row, column: str, classes: Mapping[str, str], *, is_labelled: bool) -> str | None:
    given = cells.label_of(row, column, is_labelled=is_labelled)
    if given is None:
        return None
    if given not in classes:
        raise DataError(
            f"{row.place}: the label {given!r} of {column!r} is outside the set; "
            f"{suggestion(given, list(classes))}; mend the row or fetch the file again"
        )
    return classes[given]
