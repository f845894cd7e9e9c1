"""Arguments of `python -m megatron_bert_tp.predict`; importing this takes no torch."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_bert_tp.config import task_table
from megatron_bert_tp.config.problems import listed
from megatron_bert_tp.errors import ConfigError, LayoutError

TASKS = {
    "fill-mask": "words for the [MASK]s of a text",
    "next-sentence": "whether the second text follows the first",
    "classification": "labels of a text or of a pair",
    "ner": "spans of a text with their entity",
    "question-answering": "the answer to a question in a context",
    "multiple-choice": "the best of several choices",
    "features": "last hidden states of a text",
}
_OF_KINDS = {
    task_table.Kind.CLASS: "classification",
    task_table.Kind.CLASSES: "classification",
    task_table.Kind.NUMBER: "classification",
    task_table.Kind.CHOICE: "multiple-choice",
    task_table.Kind.ANSWER: "question-answering",
    task_table.Kind.TAGS: "ner",
}
"""The task that asks a model which has learned one of finetune's."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
_CLASSIFYING, _ANSWERING, _FEATURES = ("classification",), ("question-answering",), ("features",)
_READ_BY = {
    "top": ("fill-mask", *_CLASSIFYING, *_ANSWERING),
    "aggregation": ("ner",),
    "pooling": _FEATURES,
    "max_seq_len": _ANSWERING,
    "doc_stride": _ANSWERING,
    "max_answer_len": _ANSWERING,
}
_EPILOG = """\
tasks:
{tasks}

A line is text, or two texts with a tab between them, or a JSON object; docs/predict.md has every format.
On several processes: torchrun --nproc_per_node=T -m megatron_bert_tp.predict ... --tensor T
Exit code 3 when a line could not be answered: its place in the output says why."""


@dataclass(frozen=True)
class Options:
    """What the user wishes of the answers; None is the default of the task.

    ``max_seq_len`` and ``doc_stride`` are the tokens of a window and those that it shares with the next one, and
    ``max_answer_len`` are tokens too.
    """

    top: int | None = None
    aggregation: str = "simple"
    pooling: str = "none"
    max_seq_len: int | None = None
    doc_stride: int | None = None
    max_answer_len: int = 15

    @classmethod
    def of(cls, task: str, given: Mapping[str, int | str | None]) -> "Options":
        """Options that were given; ConfigError for one that the task does not read."""
        chosen = {name: value for name, value in given.items() if name in _READ_BY and value is not None}
        for name in chosen:
            if task not in _READ_BY[name]:
                tasks = ", ".join(_READ_BY[name])
                raise ConfigError(f"--{name.replace('_', '-')} is for {tasks}, not for {task}; leave it out")
        return cls(**chosen)  # type: ignore[arg-type]


def parser() -> argparse.ArgumentParser:
    """Parser of all arguments."""
    tasks = "\n".join(f"  {name:<20}{meaning}" for name, meaning in TASKS.items())
    made = argparse.ArgumentParser(
        prog="python -m megatron_bert_tp.predict",
        description="Text in, JSON lines out: one line of output for each line of input, in order.",
        epilog=_EPILOG.format(tasks=tasks),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face directory, checkpoint or run folder")
    made.add_argument("--task", type=_task, required=True, metavar="TASK", help="what to tell; see below")
    made.add_argument("--input", type=Path, metavar="FILE", help="file to read (default: standard input)")
    made.add_argument("--output", type=Path, metavar="FILE", help="file to write (default: standard output)")
    made.add_argument("--batch", type=_natural, default=32, metavar="N", help="rows in one pass (default: 32)")
    made.add_argument("--tensor", type=_natural, default=1, metavar="T", help="processes that share the model")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    made.add_argument("--dtype", choices=DTYPES, help="number format (default: that of the files)")
    _add_options_(made)
    return made


def check_processes(num_processes: int, tensor: int) -> None:
    """LayoutError unless all processes share one model."""
    if num_processes != tensor:
        running = "1 process runs" if num_processes == 1 else f"{num_processes} processes run"
        raise LayoutError(
            f"--tensor is {tensor}, but {running}; start "
            f"torchrun --nproc_per_node={tensor}, or give --tensor {num_processes}, so that all share the model"
        )


def _add_options_(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("options of single tasks")
    group.add_argument(
        "--top",
        type=_natural,
        metavar="K",
        help="words of a [MASK] (default: 5), labels (default: all), answers (default: 1)",
    )
    group.add_argument(
        "--aggregation",
        choices=("simple", "none"),
        help="ner: neighbours of one entity as one span, or every token alone (default: simple)",
    )
    group.add_argument(
        "--pooling",
        choices=("none", "mean", "cls"),
        help="features: of every token, their mean, or that of [CLS] (default: none)",
    )
    group.add_argument(
        "--max-seq-len", type=_natural, metavar="N", help="question-answering: tokens of a window (default: 384)"
    )
    group.add_argument(
        "--doc-stride", type=_natural, metavar="N", help="tokens that two windows share (default: 128)"
    )
    group.add_argument(
        "--max-answer-len", type=_natural, metavar="N", help="most tokens of an answer (default: 15)"
    )


def _task(text: str) -> str:
    if text in TASKS:
        return text
    if text in task_table.TASKS:
        name = _OF_KINDS[task_table.TASKS[text].kind]
        raise argparse.ArgumentTypeError(
            f"{text!r} is a task of finetune; what has learned it is asked with --task {name}"
        )
    raise argparse.ArgumentTypeError(f"{text!r} is no task; choose {listed(list(TASKS))}")


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text[:10]) <= 10**9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)
