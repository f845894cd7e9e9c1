"""The model card of an export: README.md with what is known of a model, and nothing else."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from megatron_bert_tp.checkpoint.durable import JSON
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.config import task_kind_rules, update_rules
from megatron_bert_tp.config.task_table import TASKS
from megatron_bert_tp.formats.number_formats import dtype_of
from megatron_bert_tp.formats.weights import ModelSource
from megatron_bert_tp.model.shape import Head, ModelShape, tensor_shapes

SETTINGS = "settings"
"""Fact of a checkpoint under which a run keeps all its settings."""
METRICS = "metrics.jsonl"
_PIPELINES = {
    "MegatronBertModel": "feature-extraction",
    "MegatronBertForPreTraining": "fill-mask",
    "MegatronBertForMaskedLM": "fill-mask",
    "MegatronBertForCausalLM": "text-generation",
    "MegatronBertForSequenceClassification": "text-classification",
    "MegatronBertForMultipleChoice": "multiple-choice",
    "MegatronBertForTokenClassification": "token-classification",
    "MegatronBertForQuestionAnswering": "question-answering",
}  # no pipeline of transformers asks for the next sentence
_LEARNED = ("data.", "objective.", "optimizer.")
_LEARNED_OF_TASK = ("model.", "task.", *_LEARNED)
"""What a task sets of its model stands in no table of sizes."""
_PLACES = ("model.weights", "data.corpus", "data.tokenizer", "data.train", "data.validation", "data.test")
"""Of these, only the name is anybody's business."""
_PASSING = {"kind", "step", "seconds_left", "tokens_per_second", "is_best", "measured_on"}
_WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


@dataclass(frozen=True)
class Training:
    """How a model came about: optimizer steps, settings by path, last records of metrics.jsonl by kind."""

    step: int
    settings: Mapping[str, JSON] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, JSON]] = field(default_factory=dict)


def card_of(checkpoint: Checkpoint, source: ModelSource, *, dtype: torch.dtype | None = None) -> str:
    """Card for the export of a checkpoint in the number format ``dtype``, or in its own."""
    settings = checkpoint.facts.get(SETTINGS)
    training = Training(
        checkpoint.step,
        dict(_leaves(settings, "")) if isinstance(settings, Mapping) else {},
        _last_records(checkpoint.directory.parent.parent / METRICS, checkpoint.step),
    )
    size = (source.shape.vocab_size, source.shape.hidden_size)
    return model_card(
        source.shape,
        source.head,
        dtype=dtype or dtype_of(source.read, _WORD_EMBEDDINGS, size),
        has_tokenizer=bool(source.tokenizer_files),
        training=training,
    )


def model_card(
    shape: ModelShape, head: Head, *, dtype: torch.dtype, has_tokenizer: bool, training: Training | None = None
) -> str:
    """Text of README.md, with the front matter that the Hugging Face hub reads."""
    parts = [_front_matter(head), f"# {head.architecture}", _sizes(shape, head, dtype)]
    if training is not None:
        parts += list(_training(training))
    parts += [_loading(shape, head, has_tokenizer=has_tokenizer)]
    return "\n\n".join(parts) + "\n"


def _front_matter(head: Head) -> str:
    pipeline = _PIPELINES.get(head.architecture)
    lines = ["library_name: transformers", *([f"pipeline_tag: {pipeline}"] if pipeline else [])]
    return "\n".join(["---", *lines, "tags:", "- megatron-bert", "- megatron_bert_tp", "---"])


def _sizes(shape: ModelShape, head: Head, dtype: torch.dtype) -> str:
    parameters = sum(prod(size) for size in tensor_shapes(shape, head).values())
    rows: dict[str, JSON] = {
        "parameters": f"{parameters:,}",
        "number format": str(dtype).removeprefix("torch."),
        "layers": shape.num_hidden_layers,
        "hidden size": shape.hidden_size,
        "attention heads": shape.num_attention_heads,
        "intermediate size": shape.intermediate_size,
        "activation": shape.hidden_act,
        "vocabulary": shape.vocab_size,
        "longest sequence": shape.max_position_embeddings,
        "positions": shape.position_embedding_type,
    }
    if head.linear and head.num_outputs is None:
        rows["labels"] = shape.num_labels
    return f"## Sizes\n\n{_table('size', rows)}"


def _training(training: Training) -> Iterator[str]:
    if training.step == 0 and not training.settings:
        return
    yield f"## Training\n\nWritten by megatron_bert_tp after {training.step:,} optimizer steps."
    learned = {path: _shown(path, value) for path, value in _used(training.settings)}
    if learned:
        yield _table("setting", learned)
    for kind, record in training.metrics.items():
        values = {name: value for name, value in record.items() if name not in _PASSING}
        yield f"Last {kind} on record, at step {record['step']}:\n\n{_table('metric', values)}"


def _used(settings: Mapping[str, JSON]) -> Iterator[tuple[str, JSON]]:
    """The settings that have decided what was learned, without those that this run does not read."""
    task = settings.get("task.name")
    rule, precision = (str(settings.get(f"optimizer.{name}")) for name in ("name", "precision"))
    draws_none = settings.get("data.most_train") is None
    for path, value in settings.items():
        if path == "data.draw" and draws_none:
            continue
        is_learned = path.startswith(_LEARNED if task is None else _LEARNED_OF_TASK)
        is_of_task = str(task) not in TASKS or task_kind_rules.is_read(path, str(task))
        if is_learned and is_of_task and update_rules.is_read(path, name=rule, precision=precision):
            yield path, value


def _loading(shape: ModelShape, head: Head, *, has_tokenizer: bool) -> str:
    names = [*(["AutoTokenizer"] if has_tokenizer else []), head.architecture]
    lines = [f"from transformers import {', '.join(names)}", ""]
    lines += ['tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")'] if has_tokenizer else []
    lines += [f'model = {head.architecture}.from_pretrained("DIRECTORY")']
    text = "\n".join(["## Loading", "", "`DIRECTORY` is the folder of this file.", "", "```python", *lines, "```"])
    if not shape.is_relative:
        return text
    return (
        f"{text}\n\ntransformers 5 ignores `position_embedding_type` and computes without the distances "
        f"({shape.position_embedding_type}); transformers 4 and megatron_bert_tp use them."
    )


def _table(title: str, rows: Mapping[str, JSON]) -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join([f"| {title} | value |", "|---|---|", *lines])


def _cell(value: JSON) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _shown(path: str, value: JSON) -> JSON:
    if path not in _PLACES or value is None:
        return value
    places = value if isinstance(value, list) else [value]
    return ", ".join(Path(str(place)).name for place in places)


def _leaves(section: Mapping[str, JSON], path: str) -> Iterator[tuple[str, JSON]]:
    for name, value in section.items():
        place = f"{path}.{name}" if path else name
        if isinstance(value, Mapping):
            yield from _leaves(value, place)
        else:
            yield place, value


def _last_records(path: Path, step: int) -> dict[str, Mapping[str, JSON]]:
    """The newest record of each kind that is not younger than ``step``; lines that are none are passed over."""
    last: dict[str, Mapping[str, JSON]] = {}
    if not path.is_file():
        return last
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            record = _record(line)
            number = record.get("step")
            if isinstance(number, int) and number <= step:
                last[str(record.get("kind", "record"))] = record
    return last


def _record(line: str) -> Mapping[str, JSON]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, Mapping) else {}
