"""What the model gives for a batch: for each row the tensors that the answer is made of, on the CPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from megatron_bert_tp.family.arguments import Arguments
from megatron_bert_tp.family.base import PretrainedModel
from megatron_bert_tp.family.heads import whole_vocabulary
from megatron_bert_tp.family.passes import Passed
from megatron_bert_tp.prediction.arguments import Options
from megatron_bert_tp.prediction.batches import Batch
from megatron_bert_tp.text.encoder import TextEncoder

Output = tuple[Tensor, ...]
_LARGEST_LOGITS = 2**24  # numbers of the vocabulary's logits at once: 64 MiB of float32


@dataclass(frozen=True)
class Setup:
    """What a task knows of its model, its tokenizer and the user's wishes."""

    options: Options
    encoder: TextEncoder
    labels: tuple[str, ...] = ()
    problem_type: str | None = None


Head = Callable[[PretrainedModel, Passed, Batch, Setup], list[Output]]


@torch.inference_mode()
def compute(head: Head, model: PretrainedModel, batch: Batch, setup: Setup) -> list[Output]:
    """Outputs of the rows of a batch; every tensor rank must call it."""
    arguments = Arguments(batch.input_ids, batch.attention_mask, batch.token_type_ids, use_cache=False)
    return head(model, model.encode(arguments), batch, setup)


def masked_words(model: PretrainedModel, passed: Passed, batch: Batch, setup: Setup) -> list[Output]:
    """Probabilities and ids ``[masks, top]`` of the likeliest words of the [MASK]s of each row."""
    predictions = model.predictions
    assert predictions is not None
    is_mask = batch.input_ids == setup.encoder.mask_id
    hidden = passed.hidden[is_mask]
    top = min(setup.options.top or 5, model.config.vocab_size)
    chunk = max(1, _LARGEST_LOGITS // model.config.vocab_size)
    # Only at the [MASK]s: at every position, the logits of a large batch would not fit into memory.
    best = [
        _floats(whole_vocabulary(predictions, predictions(rows))).softmax(-1).topk(top)
        for rows in hidden.split(chunk)
    ]
    counts = is_mask.sum(1).tolist()
    probabilities = torch.cat([values for values, _ in best]).cpu().split(counts)
    ids = torch.cat([indices for _, indices in best]).cpu().split(counts)
    return list(zip(probabilities, ids, strict=True))


def next_sentence_logits(model: PretrainedModel, passed: Passed, _batch: Batch, _setup: Setup) -> list[Output]:
    """``[2]`` a row: B follows A, B is random."""
    return _rows(model.cls.seq_relationship(model.bert.pooler(passed.hidden)))


def pooled_logits(model: PretrainedModel, passed: Passed, _batch: Batch, _setup: Setup) -> list[Output]:
    """``[labels]`` a row."""
    return _rows(model.classify(model.bert.pooler(passed.hidden), passed))


def token_logits(model: PretrainedModel, passed: Passed, batch: Batch, _setup: Setup) -> list[Output]:
    """``[tokens, labels]`` a row."""
    return _unpadded(model.classify(passed.hidden, passed), batch)


def features(_model: PretrainedModel, passed: Passed, batch: Batch, setup: Setup) -> list[Output]:
    """``[tokens, hidden]`` a row, or ``[hidden]`` of its mean or its first token."""
    return _POOLINGS[setup.options.pooling](passed.hidden, batch)


def _floats(tensor: Tensor) -> Tensor:
    """At least float32: probabilities of half the bits would be coarse."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _rows(tensor: Tensor) -> list[Output]:
    return [(row,) for row in _floats(tensor).cpu()]


def _unpadded(tensor: Tensor, batch: Batch) -> list[Output]:
    rows = zip(_floats(tensor).cpu(), cast(Sequence[int], batch.lengths.tolist()), strict=True)
    return [(row[:length],) for row, length in rows]


def _mean(hidden: Tensor, batch: Batch) -> list[Output]:
    return [(row.mean(0),) for (row,) in _unpadded(hidden, batch)]


def _first(hidden: Tensor, _batch: Batch) -> list[Output]:
    return _rows(hidden[:, 0])


_POOLINGS: dict[str, Callable[[Tensor, Batch], list[Output]]] = {"none": _unpadded, "mean": _mean, "cls": _first}
