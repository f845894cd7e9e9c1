"""A plain loop over a class of `transformers` with `torch.optim.AdamW`, on the samples of `features`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from megatron_bert_tp.config.task_table import ARCHITECTURES, PROBLEM_TYPES, Kind
from megatron_bert_tp.data.samples.sampler import SampleOrder
from megatron_bert_tp.model.initialisation import initial_tensor
from tests.finetuning.cases import TOPICS, Files
from tests.finetuning.features import IGNORED, Part, Sample, part_of, tag_names
from tests.finetuning.measures import measures_of

SEED, RATE, STEPS, WARMUP, EVERY = 7, 1e-3, 30, 3, 5
"""As in `cases.SETTINGS`: a tenth of the steps warms up."""
HEADS = ("classifier", "qa_outputs")
DEVIATION = 0.3


@dataclass(frozen=True)
class Followed:
    """Losses of the steps, and loss and metrics of the evaluations, as the loop has them."""

    losses: list[float]
    evaluations: list[dict[str, float]]


def follow(kind: Kind, files: Files, *, global_batch: int = 8, masks_padding: bool = True) -> Followed:
    """Train and evaluate; ``masks_padding`` keeps padding out of the softmax over answers, as we do."""
    names = tag_names(files.train) if kind is Kind.TAGS else ()
    training, validation = (part_of(kind, files, path, names) for path in (files.train, files.validation))
    model = build_model(kind, files, num_tags=len(names))
    optimizer = build_optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_rate)
    order = SampleOrder(len(training.samples), SEED)
    losses, evaluations = [], []
    for step in range(STEPS):
        numbers = order.spans(np.arange(step * global_batch, (step + 1) * global_batch))
        samples = [training.samples[number] for number in numbers]
        loss = loss_of(kind, model, samples, masks_padding=masks_padding)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % EVERY == 0:
            evaluations.append(evaluate(kind, model, validation, names))
    return Followed(losses, evaluations)


def first_samples(kind: Kind, files: Files, count: int) -> list[Sample]:
    """Samples of the first step of so many."""
    names = tag_names(files.train) if kind is Kind.TAGS else ()
    part = part_of(kind, files, files.train, names)
    return [part.samples[number] for number in SampleOrder(len(part.samples), SEED).spans(np.arange(count))]


def share_of_rate(step: int) -> float:
    """Linear warm-up that loses no step to a rate of 0, and linear decay that would reach 0 after the last one."""
    return (step + 1) / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP)


def build_model(kind: Kind, files: Files, *, num_tags: int = 0) -> nn.Module:
    """The class of the kind from the same directory in float64, its new head as we draw it."""
    num_labels = {Kind.CLASS: 2, Kind.CLASSES: len(TOPICS), Kind.NUMBER: 1, Kind.TAGS: num_tags}.get(kind)
    settings: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    if kind in PROBLEM_TYPES:
        settings["problem_type"] = PROBLEM_TYPES[kind]
    model = getattr(transformers, ARCHITECTURES[kind]).from_pretrained(
        files.weights, attn_implementation="eager", **settings
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(HEADS):
                parameter.copy_(initial_tensor(name, tuple(parameter.shape), seed=SEED, deviation=DEVIATION))
    return model.double().train()


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """As in BERT's own training: a decay of 0.01, but not on biases and LayerNorms."""
    decayed, rest = [], []
    for name, parameter in model.named_parameters():
        is_spared = name.endswith("bias") or ".ln." in name or "LayerNorm" in name
        (rest if is_spared else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=1e-8)


def collate(kind: Kind, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """One padded batch with labels, as the class takes it."""
    rows = [row for sample in samples for row in sample.rows]
    width = max(len(ids) for ids, _ in rows)
    pad = partial(_padded, width=width)
    inputs = {
        "input_ids": pad([ids for ids, _ in rows]),
        "token_type_ids": pad([types for _, types in rows]),
        "attention_mask": pad([[1] * len(ids) for ids, _ in rows]),
    }
    labels = [sample.label for sample in samples]
    if kind is Kind.CHOICE:
        inputs = {name: value.view(len(samples), -1, width) for name, value in inputs.items()}
    if kind is Kind.ANSWER:
        starts, ends = torch.tensor(labels).T
        return {**inputs, "start_positions": starts, "end_positions": ends}
    if kind is Kind.TAGS:
        return {**inputs, "labels": pad(labels, filling=IGNORED)}
    dtype = torch.float64 if kind in (Kind.NUMBER, Kind.CLASSES) else torch.int64
    return {**inputs, "labels": torch.tensor(labels, dtype=dtype)}


def _padded(rows: Sequence[Sequence[int]], *, width: int, filling: int = 0) -> Tensor:
    return torch.tensor([[*row, *[filling] * (width - len(row))] for row in rows])


def loss_of(kind: Kind, model: nn.Module, samples: Sequence[Sample], *, masks_padding: bool) -> Tensor:
    """The loss of `transformers` itself, but for answers in a padded batch."""
    batch = collate(kind, samples)
    output = model(**batch)
    if kind is not Kind.ANSWER or not masks_padding:
        return output.loss
    is_padding = batch["attention_mask"] == 0
    return sum(
        F.cross_entropy(logits.masked_fill(is_padding, -torch.inf), batch[place]) / 2
        for logits, place in ((output.start_logits, "start_positions"), (output.end_logits, "end_positions"))
    )


@torch.no_grad()
def evaluate(kind: Kind, model: nn.Module, part: Part, names: Sequence[str]) -> dict[str, float]:
    """Loss of all samples as one batch, and metrics of the logits of each by itself."""
    model.eval()
    loss = loss_of(kind, model, part.samples, masks_padding=True).item()
    logits = [logits_of(kind, model, sample) for sample in part.samples]
    model.train()
    return {"loss": loss, **measures_of(kind, part, logits, names)}


@torch.no_grad()
def logits_of(kind: Kind, model: nn.Module, sample: Sample) -> Any:
    """What the class gives for one sample, which is not padded (but for choices of several lengths)."""
    batch = {
        name: value
        for name, value in collate(kind, [sample]).items()
        if name in ("input_ids", "token_type_ids", "attention_mask")
    }
    output = model(**batch)
    if kind is Kind.ANSWER:
        return torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1).numpy()
    return output.logits[0].numpy()
