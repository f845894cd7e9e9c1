"""The tasks by name: what is learned, by which class of model, and how it is measured.

It stands here, on the lowest floor, since the rules of settings read it.
"""

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What a sample is, and what the model gives for it."""

    CLASS = "one class of several"
    CLASSES = "several classes that each hold or not"
    NUMBER = "a number"
    CHOICE = "the best of several texts"
    ANSWER = "a span of a context"
    TAGS = "a class for each word"


ARCHITECTURES = {
    Kind.CLASS: "MegatronBertForSequenceClassification",
    Kind.CLASSES: "MegatronBertForSequenceClassification",
    Kind.NUMBER: "MegatronBertForSequenceClassification",
    Kind.CHOICE: "MegatronBertForMultipleChoice",
    Kind.ANSWER: "MegatronBertForQuestionAnswering",
    Kind.TAGS: "MegatronBertForTokenClassification",
}
PROBLEM_TYPES = {
    Kind.CLASS: "single_label_classification",
    Kind.CLASSES: "multi_label_classification",
    Kind.NUMBER: "regression",
}
"""`problem_type` of a sequence classifier, Hugging Face's name of what it learns."""


@dataclass(frozen=True)
class Task:
    """A row of the table: ``metrics`` are those of `tasks.metrics`, the first one keeps the best checkpoint.

    ``labels`` are the classes in the order of their numbers; None where the data says them, or there are none.
    ``threshold_metrics`` are there besides where questions may have no answer: with the best threshold for "none".
    """

    kind: Kind
    metrics: tuple[str, ...]
    labels: tuple[str, ...] | None = None
    threshold_metrics: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        """Class of the model, Hugging Face's name."""
        return ARCHITECTURES[self.kind]


_ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    # The order of the labels is that of the `glue` data set on Hugging Face's hub.
    "cola": Task(Kind.CLASS, ("matthews", "accuracy"), ("unacceptable", "acceptable")),
    "sst-2": Task(Kind.CLASS, ("accuracy",), ("negative", "positive")),
    "mrpc": Task(Kind.CLASS, ("f1", "accuracy"), ("not_equivalent", "equivalent")),
    "sts-b": Task(Kind.NUMBER, ("pearson", "spearman")),
    "qqp": Task(Kind.CLASS, ("f1", "accuracy"), ("not_duplicate", "duplicate")),
    "mnli": Task(Kind.CLASS, ("accuracy",), ("entailment", "neutral", "contradiction")),
    "qnli": Task(Kind.CLASS, ("accuracy",), _ENTAILMENT),
    "rte": Task(Kind.CLASS, ("accuracy",), _ENTAILMENT),
    "wnli": Task(Kind.CLASS, ("accuracy",), ("not_entailment", "entailment")),
    "trec": Task(Kind.CLASS, ("accuracy", "f1_macro"), ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")),
    "trec-fine": Task(Kind.CLASS, ("accuracy", "f1_macro")),
    "classification": Task(Kind.CLASS, ("accuracy", "f1_macro")),
    "multi-label": Task(Kind.CLASSES, ("f1_micro", "f1_macro", "exact_match")),
    "regression": Task(Kind.NUMBER, ("pearson", "spearman", "mean_squared_error")),
    "race": Task(Kind.CHOICE, ("accuracy",)),
    "multiple-choice": Task(Kind.CHOICE, ("accuracy",)),
    "squad": Task(Kind.ANSWER, ("f1", "exact_match"), threshold_metrics=("best_f1", "best_exact_match")),
    "token-classification": Task(Kind.TAGS, ("f1", "precision", "recall", "accuracy")),
}
