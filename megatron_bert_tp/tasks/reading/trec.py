"""Questions by the kind of their answer (TREC): a line is ``COARSE:fine question`` in Latin-1."""

import re
from collections.abc import Iterator

from megatron_bert_tp.config.problems import counted
from megatron_bert_tp.config.task_schema import TaskConfig
from megatron_bert_tp.errors import DataError
from megatron_bert_tp.tasks.examples import Example, TextExample
from megatron_bert_tp.tasks.reading.json_values import shown
from megatron_bert_tp.tasks.reading.lines import read_lines
from megatron_bert_tp.tasks.reading.parts import Note, Source

_LABELLED = re.compile(r"([A-Z]+):([a-z]+) +(\S.*)")


def read_trec(task: TaskConfig, source: Source) -> Iterator[Example | Note]:
    """An example for each line, called by its number from 0; the fine class is ``COARSE:fine``, 50 there are."""
    is_fine = task.name == "trec-fine"
    number, num_blank = 0, 0
    for line, text in read_lines(source.path, encoding="latin-1"):
        place = f"{source.path}:{line}"
        if not text.strip():
            num_blank += 1
            continue
        found = _LABELLED.fullmatch(text)
        if source.is_labelled and not found:
            raise DataError(f"{place}: must be a class and a question, as 'NUM:date When ...', not {shown(text)}")
        yield TextExample(
            id=f"{source.id_prefix}{number}",
            place=place,
            group=source.group,
            text=found[3] if found else text,
            label=(f"{found[1]}:{found[2]}" if is_fine else found[1]) if found else None,
        )
        number += 1
    if num_blank:
        yield Note(f"{source.path}: {counted(num_blank, 'blank line')} passed over")
