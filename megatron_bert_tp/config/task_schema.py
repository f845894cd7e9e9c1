"""Settings of fine-tuning and evaluation on a task, as frozen dataclasses; see `config.schema` for their kinds.

`model`, `task`, `data` and `optimizer` say what is learned; `parallel` and `run` say how it runs.
"""

from dataclasses import dataclass, field
from typing import Literal

from megatron_bert_tp.config.schema import ParallelConfig, RunConfig, UpdateConfig, setting

TaskName = Literal[
    "cola",
    "sst-2",
    "mrpc",
    "sts-b",
    "qqp",
    "mnli",
    "qnli",
    "rte",
    "wnli",
    "trec",
    "trec-fine",
    "classification",
    "multi-label",
    "regression",
    "race",
    "multiple-choice",
    "squad",
    "token-classification",
]


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """The encoder that learns the task."""

    weights: str = setting(
        required=True, meaning="Hugging Face directory, imported NGC checkpoint, or checkpoint or folder of a run"
    )
    random_weights: bool = setting(
        False, "take only sizes and tokenizer from there, and begin with random weights"
    )
    hidden_dropout_prob: float | None = setting(
        None, "dropout on hidden states; null: as the weights have it", at_least=0, at_most=0.99
    )
    attention_probs_dropout_prob: float | None = setting(
        None, "dropout on attention probabilities; null: as the weights have it", at_least=0, at_most=0.99
    )
    frozen_layers: int | None = setting(
        None, "embeddings and so many of the lowest layers stay as they are; null: all learn", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """Names of columns or keys, for the tasks whose files are tables."""

    text: str = setting("text", "the text, or what all choices have in common")
    pair: str | None = setting(None, "second text of a pair, or for multiple-choice the beginning of each choice")
    label: str = setting("label", "class, number, or number of the right choice from 0")
    id: str | None = setting(None, "what predictions are called by; null: the number of the row from 0")
    choices: tuple[str, ...] | None = setting(
        None, "multiple-choice: a column for each choice, or one that holds a list in JSON lines"
    )


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is learned."""

    # ruff does not see through the alias that the default, a field of the dataclass, is nothing that is shared.
    name: TaskName = setting(required=True, meaning="one of the tasks of docs/finetune.md")  # noqa: RUF009
    labels: tuple[str, ...] | None = setting(
        None, "classes in the order of their numbers; null: those of the task, else of the training data, sorted"
    )
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    separator: str = setting(
        ",", "multi-label: what stands between the labels of a row; the words space and tab stand for these"
    )
    scheme: Literal["auto", "iob1", "iob2", "bioes"] = setting(
        "auto", "token-classification: how tags mark entities; auto: judged by the tags of the files of each part"
    )
    unit: Literal["sentence", "document"] = setting(
        "sentence", "token-classification: what a sample is; documents too long are split between sentences"
    )
    overlap: int = setting(128, "squad: tokens that neighbouring windows of a context share", at_least=0)
    longest_answer: int = setting(30, "squad: most tokens of an answer", at_least=1)
    n_best: int = setting(20, "squad: answers that are looked at and written for each question", at_least=1)
    unanswerable: bool | None = setting(
        None, "squad: whether a question may have no answer; null: as the training or validation file says"
    )
    bad_answers: float = setting(
        0.01,
        "squad: share of answers that may not stand at their place before a file is refused",
        at_least=0,
        at_most=1,
    )
    label_smoothing: float = setting(
        0.0, "share of each label that is spread over all classes", at_least=0, below=1
    )
    class_weights: tuple[float, ...] | None = setting(None, "weight of each class in the loss; null: 1", above=0)
    balanced: bool = setting(False, "weigh classes by samples / (classes x samples of the class)")


@dataclass(frozen=True, kw_only=True)
class TaskDataConfig:
    """Files of the task; a list is read as one."""

    train: tuple[str, ...] | None = setting(None, "files or folders to learn from; fine-tuning needs them")
    validation: tuple[str, ...] | None = setting(
        None, "files or folders with labels to measure by; several are also measured one by one"
    )
    test: tuple[str, ...] | None = setting(None, "files or folders to predict, with or without labels")
    most_train: int | None = setting(None, "train on so many examples, drawn by data.draw; null: all", at_least=1)
    draw: int = setting(0, "seed of the draw of data.most_train", at_least=0, below=2**63)
    sequence_length: int = setting(128, "most tokens of a sample, special ones included", at_least=8)


@dataclass(frozen=True, kw_only=True)
class TaskOptimizerConfig(UpdateConfig):
    """How the weights move."""

    epochs: float | None = setting(
        None, "times that the training data is seen; null: 3, or what optimizer.steps makes of it", above=0
    )
    schedule: Literal["linear", "cosine", "constant"] = setting("linear", "learning rate after the warm-up")
    warmup_share: float = setting(0.1, "share of the steps that warm up", at_least=0, at_most=1)
    layer_decay: float = setting(
        1.0, "factor on the rate from each layer to the one below; the head has the full rate", above=0, at_most=1
    )


@dataclass(frozen=True, kw_only=True)
class TaskRunConfig(RunConfig):
    """Where a run writes, how often it is measured, and on what it runs."""

    seeds: tuple[int, ...] | None = setting(
        None,
        "a run for each of these seeds, in turn, with median and spread; null: optimizer.seed alone",
        at_least=0,
        below=2**63,
    )
    evaluate_every: int | None = setting(
        None, "steps between evaluations (the last step always evaluates); null: an epoch", at_least=1
    )
    metric: str | None = setting(None, "metric by which the best checkpoint is kept; null: the task's first")
    patience: int | None = setting(
        None, "stop after so many evaluations in a row without a better metric; null: never", at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """All settings of fine-tuning on a task, or of an evaluation."""

    model: StartConfig
    task: TaskConfig
    data: TaskDataConfig
    optimizer: TaskOptimizerConfig
    parallel: ParallelConfig
    run: TaskRunConfig
