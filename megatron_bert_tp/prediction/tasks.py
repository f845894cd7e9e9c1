"""The tasks: which classes can do them, how a line reads, what goes through the model, what is told."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_bert_tp.errors import DataError
from megatron_bert_tp.model.shape import HEADS
from megatron_bert_tp.prediction.answers import Answer, choice, classes, filled_masks, following, states
from megatron_bert_tp.prediction.arguments import Options
from megatron_bert_tp.prediction.entities import entities
from megatron_bert_tp.prediction.heads import (
    Head,
    features,
    masked_words,
    next_sentence_logits,
    pooled_logits,
    token_logits,
)
from megatron_bert_tp.prediction.question_answering import answers, context_windows
from megatron_bert_tp.prediction.samples import LineFormat, Sample
from megatron_bert_tp.text.encoder import Row, TextEncoder


@dataclass(frozen=True)
class Task:
    """One task; ``classes`` are those that have its head, the usual one first.

    ``sorted_batches`` are the batches among which rows are sorted by length, and so are kept in memory.
    """

    classes: tuple[str, ...]
    form: LineFormat
    encode: Callable[[Sample, TextEncoder, Options], list[Row]]
    head: Head
    answer: Answer
    sorted_batches: int = 8


def _one_row(sample: Sample, encoder: TextEncoder, _options: Options) -> list[Row]:
    """The text, or the pair."""
    return [encoder.row(sample.text, *sample.partners)]


def _row_with_masks(sample: Sample, encoder: TextEncoder, _options: Options) -> list[Row]:
    row = encoder.row(sample.text)
    if encoder.mask_id not in row.ids:
        where = "the text has no [MASK]" if row.cut is None else f"no [MASK] in the first {len(row)} tokens"
        raise DataError(f"{where}; write [MASK], in capital letters, for each word to find")
    return [row]


def _row_of_each_choice(sample: Sample, encoder: TextEncoder, _options: Options) -> list[Row]:
    return [encoder.row(sample.text, partner) for partner in sample.partners]


TASKS = {
    "fill-mask": Task(
        ("MegatronBertForMaskedLM", "MegatronBertForPreTraining"),
        LineFormat(),
        _row_with_masks,
        masked_words,
        filled_masks,
    ),
    "next-sentence": Task(
        ("MegatronBertForNextSentencePrediction", "MegatronBertForPreTraining"),
        LineFormat(second="text_pair"),
        _one_row,
        next_sentence_logits,
        following,
    ),
    "classification": Task(
        ("MegatronBertForSequenceClassification",),
        LineFormat(second="text_pair", is_optional=True),
        _one_row,
        pooled_logits,
        classes,
    ),
    "ner": Task(("MegatronBertForTokenClassification",), LineFormat(), _one_row, token_logits, entities),
    "question-answering": Task(
        ("MegatronBertForQuestionAnswering",),
        LineFormat(first="question", second="context"),
        context_windows,
        token_logits,
        answers,
    ),
    "multiple-choice": Task(
        ("MegatronBertForMultipleChoice",),
        LineFormat(first="prompt", second="choices", is_list=True),
        _row_of_each_choice,
        pooled_logits,
        choice,
    ),
    "features": Task(tuple(HEADS), LineFormat(), _one_row, features, states, sorted_batches=1),
}


def tasks_of(architecture: str) -> list[str]:
    """Names of the tasks that a class can do."""
    return [name for name, task in TASKS.items() if architecture in task.classes]
